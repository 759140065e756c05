// Waiting for another process: spin, then yield, then sleep on a futex.
#pragma once

#include <atomic>
#include <cstdint>

#include "comm/shm_layout.h"

namespace tpk::shm {

// What the caller wants to happen around a wait that may take long.
class BlockingHooks {
 public:
  virtual ~BlockingHooks() = default;
  // Called before the thread may give up its processor, any number of times (the binding releases the GIL once).
  virtual void about_to_block() = 0;
  // Polled about every 50 ms; true ends the call with kInterrupted.
  virtual bool interrupted() = 0;
};

// How long each way of waiting lasts, in nanoseconds since the wait began.
struct WaitPolicy {
  std::int64_t hold = 0;   // spin without calling about_to_block: cheaper when the peer is just about to arrive
  std::int64_t spin = 0;   // spin
  std::int64_t yield = 0;  // sched_yield between looks; then the futex

  // With more ranks than processors a spinning rank keeps the one it waits for from running. For experiments,
  // TP_KERNELS_SHM_HOLD_US, _SPIN_US and _YIELD_US replace the three.
  static WaitPolicy choose(const RankInfo* ranks, int world_size);
};

// Processors this process may run on, into RankInfo::cpus.
void allowed_cpus(std::uint64_t (&cpus)[16]);

std::int64_t monotonic_ns();

inline void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // as long as x86's pause; `yield` is a no-op on most cores
#endif
}

// Wakes whoever sleeps at the door of `mine`.
void wake_sleepers(Progress& mine);

// Makes a step of this rank visible and wakes those who sleep for it. The store and the load are sequentially
// consistent, as are the two of sleep_at(): one of the two sides always sees the other.
inline void publish(std::atomic<std::uint64_t>& word, std::uint64_t value, Progress& mine) {
  word.store(value, std::memory_order_seq_cst);
  if (mine.sleepers.load(std::memory_order_seq_cst) != 0) wake_sleepers(mine);
}

// Sleeps at `door` until it is opened, a signal comes or `ns` pass, unless `word` has reached `target` already.
// True when a signal ended the sleep.
bool sleep_at(Progress& peer, const std::atomic<std::uint64_t>& word, std::uint64_t target, std::int64_t ns);

}  // namespace tpk::shm
