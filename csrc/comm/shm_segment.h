// The shared memory of one group: an unnamed file in /dev/shm, so that nothing is left behind whenever a rank is
// killed.
#pragma once

#include <cstdint>
#include <string>

#include "comm/shm_layout.h"
#include "common/status.h"

namespace tpk::shm {

// How a rank finds the segment of rank 0: through /proc/<pid>/fd/<fd>, checked against the inode.
struct Descriptor {
  std::int64_t pid = 0;
  int fd = -1;
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t bytes = 0;
};

class Segment {
 public:
  Segment() = default;
  ~Segment() { unmap(); }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Rank 0: makes the file in `directory` with the control block; kNoSpace tells needed and free bytes.
  Status create(const std::string& directory, const Layout& layout);
  // The others: opens rank 0's file.
  Status attach(const Descriptor& descriptor, int world_size);
  // Every rank: allocates its own slots (on its own NUMA node, by first touch) and touches the whole mapping.
  Status reserve(int rank);
  // After all have attached; the file lives on through the mappings.
  void close_file();
  void unmap();

  const Descriptor& descriptor() const { return descriptor_; }
  const Layout& layout() const { return layout_; }
  Control* control() const { return static_cast<Control*>(base_); }
  char* at(std::size_t offset) const { return static_cast<char*>(base_) + offset; }
  bool mapped() const { return base_ != nullptr; }

 private:
  Status map(std::size_t bytes);

  Descriptor descriptor_;
  Layout layout_;
  std::string directory_;
  int fd_ = -1;
  void* base_ = nullptr;
};

}  // namespace tpk::shm
