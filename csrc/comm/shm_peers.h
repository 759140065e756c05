// Whether the processes of a group still live: pidfds, or /proc where the kernel or a sandbox refuses those.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/shm_layout.h"

namespace tpk::shm {

// Start time of a live process in clock ticks after boot; 0 when there is none or it is a zombie, kUnknownStartTime
// when that cannot be found out.
constexpr std::uint64_t kUnknownStartTime = ~std::uint64_t{0};
std::uint64_t process_start_time(std::int64_t pid);

class Peers {
 public:
  Peers() = default;
  ~Peers() { close(); }
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  void open(const RankInfo* ranks, int world_size, int rank);
  void close();
  // Bit r is set when the process of rank r has ended (zombies included). One system call for the whole group.
  std::uint64_t dead();

 private:
  std::vector<RankInfo> ranks_;
  std::vector<int> fds_;  // -1: watched through /proc
  std::uint64_t dead_ = 0;
  int rank_ = 0;
};

}  // namespace tpk::shm
