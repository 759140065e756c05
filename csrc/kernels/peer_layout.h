// Peer-memory kernels: sizes, grids, slices and the counting rules of their protocol, as pure functions.
//
// Kernels, launchers and the tests' protocol model all take them from here. Every rank evaluates them on values that
// all ranks share (bytes, world size, an agreed max_blocks), never on what its own device has, so grids agree by
// construction.
//
// Workspace of one communicator, on every rank at the same offsets from its base (all multiples of kAlignment):
//
//   half 0 | half 1      half_bytes each. Staging areas of the kernels, used in turn.
//   registered area      belongs to the caller: all ranks read inputs there in place, and write outputs there.
//                        The same tensor must lie at the same offset on every rank.
//   Flags                kFlagBytes, zero at first
//   Lamport buffers      kLamportBuffers x world x kLamportBytes, every 32-bit word kEmptyWord at first
//
// A kernel is handed data[r] (address of half 0 of rank r) and flags[r] (of its Flags) for every rank r.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define TPK_HOST_DEVICE __host__ __device__
#else
#define TPK_HOST_DEVICE
#endif

namespace tpk {
namespace peer {

constexpr int kMaxWorld = 16;
constexpr int kMaxBlocks = 64;            // NVLink is full with fewer; this many also fill half an H100
constexpr std::size_t kPackBytes = 16;    // one vector access
constexpr std::size_t kAlignment = 1024;  // of the parts of a workspace
constexpr std::size_t kFlagBytes = 16 << 10;
constexpr std::size_t kLamportBytes = 256 << 10;  // largest message of the Lamport kernels
constexpr int kLamportBuffers = 3;
constexpr std::uint32_t kEmptyWord = 0x80000000u;  // -0.0f, or the bf16 or fp16 pair (+0.0, -0.0)
constexpr std::uint32_t kErrorMagic = 0x54504b45u;
constexpr std::size_t kErrorBytes = 64;

enum class Algorithm : int {
  kOneShot = 0,          // every rank reads all data of all ranks
  kTwoShot = 1,          // every rank reduces one slice, then the slices are exchanged
  kMultimem = 2,         // two-shot, added and distributed by the switch
  kLamport = 3,          // one-shot by pushing: the data is its own flag
  kMultimemOneShot = 4,  // one-shot, added by the switch
};
constexpr int kNumAlgorithms = 5;

constexpr bool splits_slices(Algorithm a) { return a == Algorithm::kTwoShot || a == Algorithm::kMultimem; }
constexpr bool uses_multicast(Algorithm a) { return a == Algorithm::kMultimem || a == Algorithm::kMultimemOneShot; }

// ---- counting ------------------------------------------------------------------------------------------------------

// What a block knows of the past. Every call leaves the same record for all kMaxBlocks blocks (see advances).
struct BlockState {
  std::uint64_t calls;          // calls so far that used flags
  std::uint64_t lamport_calls;  // calls so far that used Lamport buffers
  std::uint64_t lamport_bytes;  // per slot, of the last of those: what has to be emptied
  std::uint64_t unused;
};

// Of the kernel that multiplies, too, written in Triton (tp_kernels/ops/kernels/peer_linear_kernel.py). A row block is
// what one row of its tiles covers; row block b is number b / world of rank b % world.
constexpr int kMaxRowBlocks = 128;  // of one call
struct LinearFlags {
  // signal_value of the last call in which [step * world + r] rank r's tiles of the owner's row block `step` were here.
  std::uint64_t arrived[kMaxRowBlocks];
  std::uint64_t finished[kMaxRowBlocks];    // [b]: of the last call in which row block b could be read at its owner
  std::uint32_t multiplied[kMaxRowBlocks];  // [b]: tiles that this rank has stored in this call; zero between calls
  std::uint32_t reduced[kMaxRowBlocks];     // [step]: groups of rows that this rank has reduced; zero between calls
  std::uint32_t taken;                      // entries of the list of work; zero between calls
};

struct Flags {
  // signal[b][r]: how far block b of rank r has come; written by rank r, read by the owner. One cache line a block.
  // 64 bits never wrap, so a block that large grids alone have can rest for any number of calls.
  std::uint64_t signal[kMaxBlocks][kMaxWorld];
  BlockState state[kMaxBlocks];  // touched by the owner only
  std::uint32_t failed;          // set by the owner's first wait that gave up; stops all its later calls
  alignas(128) LinearFlags linear;
};
static_assert(sizeof(Flags) <= kFlagBytes, "the flags do not fit their part of the workspace");

// In host memory that the device can write. `magic` is written last; the host may write a nonzero one to stop all
// waits.
struct ErrorRecord {
  std::uint32_t magic;
  std::uint32_t kind;
  std::int32_t rank;    // waited for
  std::uint32_t block;  // that waited
  std::uint64_t call;   // BlockState::calls or lamport_calls
  std::uint32_t phase;
  std::uint32_t waiter;  // the rank that writes this record
};
static_assert(sizeof(ErrorRecord) <= kErrorBytes, "the error record grew");
enum class ErrorKind : std::uint32_t { kSignal = 1, kData = 2 };

constexpr int kMaxPhases = 4;

// Value of the flag once a block has reached `phase` of `call`; all later values are larger.
TPK_HOST_DEVICE constexpr std::uint64_t signal_value(std::uint64_t call, int phase) {
  return call * kMaxPhases + static_cast<std::uint64_t>(phase) + 1;
}
TPK_HOST_DEVICE constexpr int half_of(std::uint64_t call) { return static_cast<int>(call % 2); }
TPK_HOST_DEVICE constexpr int lamport_buffer(std::uint64_t call) { return static_cast<int>(call % kLamportBuffers); }
// The buffer that a Lamport call empties: its predecessor's, which its second successor will fill.
TPK_HOST_DEVICE constexpr int lamport_emptied(std::uint64_t call) {
  return static_cast<int>((call + kLamportBuffers - 1) % kLamportBuffers);
}
// Whether block `block` of a grid of `blocks` writes the next record of block `other`. A block's own record is among
// those it writes and nobody else reads or writes them in this call, so neither an atomic nor a grid barrier is needed.
TPK_HOST_DEVICE constexpr bool advances(int block, int blocks, int other) { return other % blocks == block; }

// ---- sizes ---------------------------------------------------------------------------------------------------------

TPK_HOST_DEVICE constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
TPK_HOST_DEVICE constexpr std::size_t round_up(std::size_t a, std::size_t b) { return ceil_div(a, b) * b; }
TPK_HOST_DEVICE constexpr std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

struct Layout {
  std::size_t half_bytes, registered_offset, flags_offset, lamport_offset, total_bytes;
};
constexpr Layout layout_of(int world, std::size_t half_bytes, std::size_t registered_bytes) {
  const std::size_t half = round_up(half_bytes, kAlignment);
  const std::size_t flags = 2 * half + round_up(registered_bytes, kAlignment);
  const std::size_t lamport = flags + kFlagBytes;
  return {half, 2 * half, flags, lamport, lamport + kLamportBuffers * static_cast<std::size_t>(world) * kLamportBytes};
}

// Part of `units` (packs or rows) that `rank` reduces: equal but for the last ones, which may be short or empty.
struct Slice {
  std::size_t begin, end;
};
TPK_HOST_DEVICE constexpr Slice slice_of(std::size_t units, int world, int rank) {
  const std::size_t length = ceil_div(units, static_cast<std::size_t>(world));
  const std::size_t begin = smaller(units, length * static_cast<std::size_t>(rank));
  return {begin, smaller(units, begin + length)};
}

// ---- grids ---------------------------------------------------------------------------------------------------------

struct Shape {
  int blocks, threads;
};

constexpr int usable_blocks(int max_blocks) {
  return max_blocks < 1 ? 1 : (max_blocks > kMaxBlocks ? kMaxBlocks : max_blocks);
}

// All-reduce of `bytes`: a pack a thread while the blocks last; blocks of 256 threads until that leaves some threads
// more than one pack, for latency, of 512 from there on, for bandwidth.
constexpr Shape all_reduce_shape(Algorithm algorithm, std::size_t bytes, int world, int max_blocks) {
  std::size_t units = ceil_div(bytes, kPackBytes);
  if (splits_slices(algorithm)) units = ceil_div(units, static_cast<std::size_t>(world));
  std::size_t limit = static_cast<std::size_t>(usable_blocks(max_blocks));
  if (uses_multicast(algorithm)) limit = smaller(limit, 16);  // the switch adds; a few multiprocessors fill the links
  const std::size_t threads = units <= 256 * limit ? 256 : 512;
  const std::size_t blocks = smaller(ceil_div(units, threads), limit);
  return {blocks < 1 ? 1 : static_cast<int>(blocks), static_cast<int>(threads)};
}

// All-reduce + norm: `row_threads` threads hold a row, `packs` packs each; a block holds threads / row_threads rows.
struct NormShape {
  int blocks, threads, row_threads, packs;
};
constexpr std::size_t kMaxRowThreads = 512;
constexpr std::size_t kMaxRowPacks = 4 * kMaxRowThreads;         // of one row: 16384 16-bit elements
constexpr std::size_t kMaxLamportRowPacks = 2 * kMaxRowThreads;  // that kernel waits for all packs of a thread at once

// With a block for every row, a row takes as many threads as it has packs (latency). With more rows than blocks, four
// packs a thread, so that a block has several rows in flight and the loads of one cover the reduction of another.
// Precondition: rows of at most kMaxRowPacks, or kMaxLamportRowPacks.
constexpr NormShape norm_shape(Algorithm algorithm, std::size_t rows, std::size_t row_packs, int world,
                               int max_blocks) {
  const std::size_t units = splits_slices(algorithm) ? ceil_div(rows, static_cast<std::size_t>(world)) : rows;
  const std::size_t limit = static_cast<std::size_t>(usable_blocks(max_blocks));
  std::size_t packs = units <= limit || algorithm == Algorithm::kLamport || row_packs <= 32 ? 1 : 4;
  std::size_t row_threads = 32;
  while (row_threads * packs < row_packs && row_threads < kMaxRowThreads) row_threads *= 2;
  while (row_threads * packs < row_packs) packs *= 2;
  std::size_t groups = 1;
  while (2 * groups * row_threads <= kMaxRowThreads && groups * limit < units) groups *= 2;
  const std::size_t blocks = smaller(ceil_div(units, groups), limit);
  return {blocks < 1 ? 1 : static_cast<int>(blocks), static_cast<int>(groups * row_threads),
          static_cast<int>(row_threads), static_cast<int>(packs)};
}

}  // namespace peer
}  // namespace tpk
