#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace tpk {
namespace cpu {
namespace {

constexpr int kMaxThreads = 256;
// Between two ops of one forward pass lie a few microseconds of Python, which spinning must cover; a process that does
// something else gives its core back after twice this.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields; false when the time is up.
template <class Done>
bool spin_until(Done done, bool forever) {
  for (int i = 0; i < 64; ++i) {
    if (done()) return true;
    pause();
  }
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    // Somebody else may need this core, perhaps the very thread that is waited for.
    if (waited > kSpin) sched_yield();
    if (!forever && waited > 2 * kSpin) return done();
  }
}

class Pool {
 public:
  // One call at a time; false if the pool is in use.
  bool run(int threads, std::ptrdiff_t chunks, ChunkFn fn, void* context) {
    std::unique_lock<std::mutex> user(user_, std::try_to_lock);
    if (!user.owns_lock()) return false;
    grow(threads - 1);
    fn_ = fn;
    context_ = context;
    chunks_ = chunks;
    seats_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    epoch_ = (epoch_ + 1) & kEpochMask;
    // seq_cst against sleepers_: either the sleeper sees the open gate or we see the sleeper.
    gate_.store((epoch_ << kEpochShift) | kOpen, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work();
    const std::uint64_t joined = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoinedMask;
    spin_until([&] { return left_.load(std::memory_order_acquire) == joined; }, true);
    return true;
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

 private:
  // gate: epoch | open | how many threads joined. A thread joins by a compare-and-swap on the whole word, so it can
  // neither join a call that was closed nor mix up two calls, and the caller waits for exactly those that joined.
  static constexpr std::uint64_t kJoinedMask = 0xffff;
  static constexpr std::uint64_t kOpen = 1u << 16;
  static constexpr int kEpochShift = 17;
  static constexpr std::uint64_t kEpochMask = (std::uint64_t{1} << 47) - 1;

  void grow(int wanted) {
    if (wanted > kMaxThreads) wanted = kMaxThreads;
    while (size() < wanted) {
      // Signals belong to Python's main thread.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      bool started = true;
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        started = false;  // out of threads: fewer do the work
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (!started) return;
      size_.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void work() {
    for (;;) {
      const std::ptrdiff_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks_) return;
      fn_(context_, chunk);
    }
  }

  void serve();

  bool join(std::uint64_t* seen) {
    std::uint64_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & kOpen) && (gate >> kEpochShift) != *seen) {
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        *seen = gate >> kEpochShift;
        if (static_cast<std::ptrdiff_t>(gate & kJoinedMask) < seats_) return true;
        left_.fetch_add(1, std::memory_order_release);  // joined, but there is no seat: leave at once
        return false;
      }
    }
    return false;
  }

  std::mutex user_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> size_{0};
  std::uint64_t epoch_ = 0;
  ChunkFn fn_ = nullptr;
  void* context_ = nullptr;
  std::ptrdiff_t chunks_ = 0, seats_ = 0;
  alignas(64) std::atomic<std::uint64_t> gate_{0};
  alignas(64) std::atomic<std::ptrdiff_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> left_{0};
  alignas(64) std::atomic<int> sleepers_{0};
};

thread_local bool inside = false;

void Pool::serve() {
  inside = true;
  std::uint64_t seen = 0;
  for (;;) {
    if (spin_until([&] { return join(&seen); }, false)) {
      work();
      left_.fetch_add(1, std::memory_order_release);
      continue;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] {
      const std::uint64_t gate = gate_.load(std::memory_order_seq_cst);
      return (gate & kOpen) && (gate >> kEpochShift) != seen;
    });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

// Never destroyed: its detached threads may outlive static destructors, and end with the process.
std::atomic<Pool*> instance{nullptr};

// In the child of a fork the threads are gone and the locks may be held for ever: forget the pool, the next call starts
// another. The old one's memory is lost, once per fork.
void forget_pool() {
  instance.store(nullptr, std::memory_order_relaxed);
  inside = false;
}

Pool* pool() {
  Pool* current = instance.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  if (registered != 0) return nullptr;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || instance.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;  // another thread was first; no thread of this one was started
  return current;
}

}  // namespace

void parallel_for(int threads, std::ptrdiff_t chunks, ChunkFn fn, void* context) {
  if (threads > chunks) threads = static_cast<int>(chunks);
  if (threads > 1 && !inside) {
    Pool* shared = pool();
    if (shared != nullptr) {
      inside = true;
      const bool ran = shared->run(threads, chunks, fn, context);
      inside = false;
      if (ran) return;
    }
  }
  for (std::ptrdiff_t chunk = 0; chunk < chunks; ++chunk) fn(context, chunk);
}

int pool_size() {
  const Pool* current = instance.load(std::memory_order_acquire);
  return current == nullptr ? 0 : current->size();
}

}  // namespace cpu
}  // namespace tpk
