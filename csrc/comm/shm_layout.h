// What the ranks of one group see in their shared segment. Every field that two processes touch is a std::atomic; plain
// fields are ordered by the release store and acquire load of an atomic next to them.
//
//   Control | rank 0: one-shot slots [2], staging slots [3], result slots [3] | rank 1: ... | ...
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace tpk::shm {

constexpr int kMaxRanks = 64;
constexpr int kOneShotSlots = 2;  // a slot is free again once every rank has begun the next call
constexpr int kRing = 3;          // staging depth: rank r copies chunk k+1 in while others still read chunk k-1
constexpr std::size_t kPage = 4096;
constexpr std::size_t kLine = 128;  // two cache lines: the adjacent-line prefetcher would pair 64-byte ones
constexpr std::uint64_t kMagic = 0x74706b2d73686d32;  // "tpk-shm2"

// What a rank called. Two of these, used in turn: a rank can overwrite one only after every rank has begun the call in
// between, hence has finished reading it.
struct alignas(kLine) CallHeader {
  std::atomic<std::uint64_t> sequence;
  std::uint64_t what;   // operation | dtype << 8 | reduction << 16 | root << 24
  std::uint64_t count;  // elements
  std::uint64_t sizes;  // hash of the per-rank sizes, 0 when they are equal
};

// How far a rank is. The counters run over all chunks of all calls and only grow.
struct alignas(kLine) Progress {
  std::atomic<std::uint64_t> staged;     // chunks copied into the staging ring
  std::atomic<std::uint64_t> consumed;   // chunks whose staged data were read; an all-reduce result is out as well
  std::atomic<std::uint64_t> gathered;   // chunks whose results were read from the others
  std::atomic<std::uint64_t> completed;  // sequence number of the last call that ended
  std::atomic<std::uint32_t> door;       // futex: changes when this rank moves on while others sleep
  std::atomic<std::uint32_t> sleepers;   // ranks asleep at the door
  std::atomic<std::uint32_t> left;       // 1 once this rank has closed the communicator
  std::atomic<std::uint32_t> cpu;        // processor it ran on when it last began a call
};

enum class Cause : std::uint32_t { kNone = 0, kTimeout, kPeerDied, kMismatch, kLeft, kInterrupted, kClosed };

// Written once, by the first rank that fails; state goes 0 -> 1 (being written) -> 2 (readable).
struct alignas(kLine) AbortRecord {
  std::atomic<std::uint32_t> state;
  Cause cause;
  std::int32_t reporter;
  std::uint64_t sequence;
  std::uint64_t culprits;  // bit r: rank r is to blame
  char operation[16];
  char text[8192];
};

struct RankInfo {
  std::int64_t pid;
  std::uint64_t start_time;  // clock ticks after boot, from /proc: tells a process from a later one with its pid
  std::uint64_t cpus[16];    // the processors it may run on, bit by bit
};

struct Control {
  std::uint64_t magic;
  std::int32_t world_size;
  std::uint64_t one_shot_bytes;
  std::uint64_t chunk_bytes;
  std::uint64_t total_bytes;
  char directory[256];
  RankInfo ranks[kMaxRanks];
  // far[r] is 1 while data move slowly between the caches of rank r and the others' (another socket or core complex):
  // all of them then stage past the cache, through memory.
  alignas(kLine) std::atomic<std::uint8_t> far[kMaxRanks];
  AbortRecord abort;
  CallHeader headers[2][kMaxRanks];
  Progress progress[kMaxRanks];
};

constexpr std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// Sizes of the areas; a pure function of what rank 0 writes into Control.
struct Layout {
  int world_size = 0;
  std::size_t one_shot_bytes = 0;  // one slot of a rank
  std::size_t chunk_bytes = 0;     // one staging slot of a rank
  std::size_t part_bytes = 0;      // one result slot of a rank: its share of a chunk

  static Layout of(int world_size, std::size_t one_shot_bytes, std::size_t chunk_bytes) {
    Layout layout;
    layout.world_size = world_size;
    layout.one_shot_bytes = round_up(one_shot_bytes, 64);
    layout.part_bytes = round_up((chunk_bytes + world_size - 1) / world_size, 64);
    layout.chunk_bytes = layout.part_bytes * world_size;
    return layout;
  }
  std::size_t control_bytes() const { return round_up(sizeof(Control), kPage); }
  std::size_t rank_bytes() const {
    return round_up(kOneShotSlots * one_shot_bytes + kRing * (chunk_bytes + part_bytes), kPage);
  }
  std::size_t total_bytes() const { return control_bytes() + rank_bytes() * world_size; }
  std::size_t rank_offset(int rank) const { return control_bytes() + rank_bytes() * rank; }
  std::size_t one_shot(int rank, std::uint64_t sequence) const {
    return rank_offset(rank) + (sequence % kOneShotSlots) * one_shot_bytes;
  }
  std::size_t staging(int rank, std::uint64_t step) const {
    return rank_offset(rank) + kOneShotSlots * one_shot_bytes + (step % kRing) * chunk_bytes;
  }
  std::size_t result(int rank, std::uint64_t step) const {
    return rank_offset(rank) + kOneShotSlots * one_shot_bytes + kRing * chunk_bytes + (step % kRing) * part_bytes;
  }
};

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "shared memory needs lock-free 64-bit atomics");
static_assert(sizeof(std::atomic<std::uint32_t>) == 4, "a futex is a plain 32-bit word");

}  // namespace tpk::shm
