#include "comm/shm_peers.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434  // the same number on every architecture
#endif

namespace tpk::shm {

std::uint64_t process_start_time(std::int64_t pid) {
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%lld/stat", static_cast<long long>(pid));
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return errno == ENOENT || errno == ESRCH ? 0 : kUnknownStartTime;
  char text[1024];
  const std::size_t n = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[n] = 0;
  // The command name may hold spaces and parentheses: fields count from the last one. State is the 3rd field of the
  // line, start time the 22nd.
  const char* at = std::strrchr(text, ')');
  if (at == nullptr || at[1] != ' ') return 0;
  at += 2;
  if (*at == 'Z' || *at == 'X' || *at == 'x') return 0;
  for (int field = 3; field < 22; ++field) {
    at = std::strchr(at, ' ');
    if (at == nullptr) return 0;
    ++at;
  }
  return std::strtoull(at, nullptr, 10);
}

namespace {

// A process that cannot be looked at, for want of a file descriptor say, counts as living.
bool has_ended(const RankInfo& info) {
  const std::uint64_t now = process_start_time(info.pid);
  return now != kUnknownStartTime && info.start_time != kUnknownStartTime && now != info.start_time;
}

}  // namespace

void Peers::open(const RankInfo* ranks, int world_size, int rank) {
  rank_ = rank;
  ranks_.assign(ranks, ranks + world_size);
  fds_.assign(world_size, -1);
  const std::int64_t self = getpid();
  for (int r = 0; r < world_size; ++r) {
    if (r == rank || ranks[r].pid == self) continue;
    const int fd = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(ranks[r].pid), 0));
    fds_[r] = fd;
    // Looked up after opening: if the pid was reused before, this sees the newcomer and knows the peer is gone.
    if (has_ended(ranks[r])) dead_ |= std::uint64_t{1} << r;
  }
}

void Peers::close() {
  for (int& fd : fds_) {
    if (fd >= 0) ::close(fd);
    fd = -1;
  }
}

std::uint64_t Peers::dead() {
  pollfd polled[kMaxRanks];
  int rank_of[kMaxRanks];
  int n = 0;
  const std::int64_t self = getpid();
  for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
    if (r == rank_ || ranks_[r].pid == self || (dead_ >> r & 1)) continue;
    if (fds_[r] >= 0) {
      polled[n] = {fds_[r], POLLIN, 0};
      rank_of[n++] = r;
    } else if (has_ended(ranks_[r])) {
      dead_ |= std::uint64_t{1} << r;
    }
  }
  if (n > 0 && poll(polled, n, 0) > 0) {
    for (int i = 0; i < n; ++i)
      if (polled[i].revents & POLLIN) dead_ |= std::uint64_t{1} << rank_of[i];
  }
  return dead_;
}

}  // namespace tpk::shm
