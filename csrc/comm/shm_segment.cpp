#include "comm/shm_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>
#include <new>

namespace tpk::shm {
namespace {

std::string reason(const std::string& what) { return what + ": " + std::strerror(errno); }

// A named file that loses its name at once, for file systems without O_TMPFILE.
int open_unlinked(const std::string& directory) {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  for (int attempt = 0; attempt < 100; ++attempt) {
    const std::string path = directory + "/tp_kernels-" + std::to_string(getpid()) + "-" + std::to_string(now.tv_nsec) +
                             "-" + std::to_string(attempt);
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd >= 0) {
      unlink(path.c_str());
      return fd;
    }
    if (errno != EEXIST) return -1;
  }
  return -1;
}

// posix_fallocate reports by return value and gives up on a signal.
int allocate(int fd, off_t offset, off_t bytes) {
  int error;
  do {
    error = posix_fallocate(fd, offset, bytes);
  } while (error == EINTR);
  return error;
}

Status no_space(int fd, const std::string& directory, std::size_t needed) {
  struct statvfs stats;
  std::string free = "unknown";
  if (fstatvfs(fd, &stats) == 0) free = std::to_string(static_cast<std::uint64_t>(stats.f_bavail) * stats.f_bsize);
  return Status::Error(Code::kNoSpace, directory + " is too small: the group needs " + std::to_string(needed) +
                                           " bytes, " + free + " are free");
}

}  // namespace

Status Segment::create(const std::string& directory, const Layout& layout) {
  directory_ = directory;
  layout_ = layout;
  fd_ = open(directory.c_str(), O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
  if (fd_ < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) fd_ = open_unlinked(directory);
  if (fd_ < 0) return Status::Error(Code::kSystem, reason("cannot create a file in " + directory));
  const std::size_t bytes = layout.total_bytes();
  struct statvfs stats;
  if (fstatvfs(fd_, &stats) == 0 && stats.f_blocks != 0 &&
      static_cast<std::uint64_t>(stats.f_bavail) * stats.f_bsize < bytes)
    return no_space(fd_, directory, bytes);
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0)
    return Status::Error(Code::kSystem, reason("cannot size a file in " + directory));
  if (const int error = allocate(fd_, 0, static_cast<off_t>(layout.control_bytes()))) {
    if (error == ENOSPC) return no_space(fd_, directory, bytes);
    errno = error;
    return Status::Error(Code::kSystem, reason("cannot allocate in " + directory));
  }
  struct stat info;
  if (fstat(fd_, &info) != 0) return Status::Error(Code::kSystem, reason("fstat"));
  descriptor_ = {getpid(), fd_, static_cast<std::uint64_t>(info.st_dev), static_cast<std::uint64_t>(info.st_ino),
                 bytes};
  if (Status status = map(bytes); !status.ok()) return status;
  Control* control = new (base_) Control{};  // the file is zero already; this begins the lifetime of the atomics
  control->world_size = layout.world_size;
  control->one_shot_bytes = layout.one_shot_bytes;
  control->chunk_bytes = layout.chunk_bytes;
  control->total_bytes = bytes;
  directory.copy(control->directory, sizeof(control->directory) - 1);
  control->magic = kMagic;
  return Status::Ok();
}

Status Segment::attach(const Descriptor& descriptor, int world_size) {
  const std::string path = "/proc/" + std::to_string(descriptor.pid) + "/fd/" + std::to_string(descriptor.fd);
  fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) return Status::Error(Code::kSystem, reason("cannot open rank 0's segment through " + path));
  struct stat info;
  if (fstat(fd_, &info) != 0) return Status::Error(Code::kSystem, reason("fstat"));
  if (static_cast<std::uint64_t>(info.st_dev) != descriptor.device ||
      static_cast<std::uint64_t>(info.st_ino) != descriptor.inode ||
      static_cast<std::uint64_t>(info.st_size) != descriptor.bytes || descriptor.bytes < sizeof(Control))
    return Status::Error(Code::kSystem, path + " is not the segment that rank 0 published");
  descriptor_ = descriptor;
  if (Status status = map(descriptor.bytes); !status.ok()) return status;
  const Control* control = this->control();
  if (control->magic != kMagic || control->world_size != world_size || control->total_bytes != descriptor.bytes)
    return Status::Error(Code::kSystem, path + " holds another version or another world size");
  directory_.assign(control->directory, strnlen(control->directory, sizeof(control->directory)));
  layout_ = Layout::of(world_size, control->one_shot_bytes, control->chunk_bytes);
  if (layout_.total_bytes() != descriptor.bytes)
    return Status::Error(Code::kSystem, path + " has another layout than this build of tp_kernels");
  return Status::Ok();
}

Status Segment::map(std::size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (base == MAP_FAILED) return Status::Error(Code::kSystem, reason("cannot map " + std::to_string(bytes) + " bytes"));
  base_ = base;
  return Status::Ok();
}

Status Segment::reserve(int rank) {
  const std::size_t offset = layout_.rank_offset(rank);
  const std::size_t bytes = layout_.rank_bytes();
  if (const int error = allocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes))) {
    if (error == ENOSPC) return no_space(fd_, directory_, descriptor_.bytes);
    errno = error;
    return Status::Error(Code::kSystem, reason("cannot allocate shared memory"));
  }
  std::memset(at(offset), 0, bytes);
  return Status::Ok();
}

void Segment::close_file() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void Segment::unmap() {
  close_file();
  if (base_ != nullptr) munmap(base_, descriptor_.bytes);
  base_ = nullptr;
}

}  // namespace tpk::shm
