#include "comm/shm_wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace tpk::shm {
namespace {

// Whole processors that the control group's quota allows; a large number when there is none.
int quota_cpus() {
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
  if (file == nullptr) return INT_MAX;
  char text[64] = {};
  const bool read = std::fgets(text, sizeof(text), file) != nullptr;
  std::fclose(file);
  char* end = nullptr;
  const long long quota = read ? std::strtoll(text, &end, 10) : 0;  // "max 100000" parses as 0
  const long long period = quota > 0 ? std::strtoll(end, nullptr, 10) : 0;
  if (quota <= 0 || period <= 0) return INT_MAX;
  const long long cpus = quota / period;
  return cpus < 1 ? 1 : static_cast<int>(cpus < INT_MAX ? cpus : INT_MAX);
}

std::int64_t from_environment(const char* name, std::int64_t microseconds) {
  const char* text = std::getenv(name);
  return (text != nullptr ? std::atoll(text) : microseconds) * 1000;
}

}  // namespace

void allowed_cpus(std::uint64_t (&cpus)[16]) {
  std::memset(cpus, 0, sizeof(cpus));
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return;
  for (int cpu = 0; cpu < 1024 && cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus[cpu / 64] |= std::uint64_t{1} << (cpu % 64);
}

WaitPolicy WaitPolicy::choose(const RankInfo* ranks, int world_size) {
  int cpus = 0;
  for (int word = 0; word < 16; ++word) {
    std::uint64_t any = 0;
    for (int r = 0; r < world_size; ++r) any |= ranks[r].cpus[word];
    cpus += __builtin_popcountll(any);
  }
  if (cpus == 0) cpus = world_size;  // affinity unknown
  const int quota = quota_cpus();
  WaitPolicy policy;
  if (world_size <= (cpus < quota ? cpus : quota)) {
    policy.hold = from_environment("TP_KERNELS_SHM_HOLD_US", 10);
    policy.spin = from_environment("TP_KERNELS_SHM_SPIN_US", 20);
    policy.yield = from_environment("TP_KERNELS_SHM_YIELD_US", 1000);
  } else {
    policy.hold = from_environment("TP_KERNELS_SHM_HOLD_US", 0);
    policy.spin = from_environment("TP_KERNELS_SHM_SPIN_US", 0);
    policy.yield = from_environment("TP_KERNELS_SHM_YIELD_US", 10);
  }
  return policy;
}

std::int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

void wake_sleepers(Progress& mine) {
  mine.door.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&mine.door), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool sleep_at(Progress& peer, const std::atomic<std::uint64_t>& word, std::uint64_t target, std::int64_t ns) {
  bool signalled = false;
  const std::uint32_t seen = peer.door.load(std::memory_order_seq_cst);
  peer.sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (word.load(std::memory_order_seq_cst) < target && peer.left.load(std::memory_order_seq_cst) == 0) {
    const timespec timeout = {static_cast<std::time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
    // Not FUTEX_PRIVATE: the word lies at different addresses in different processes.
    signalled = syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&peer.door), FUTEX_WAIT, seen, &timeout, nullptr,
                        0) == -1 &&
                errno == EINTR;
  }
  peer.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return signalled;
}

}  // namespace tpk::shm
