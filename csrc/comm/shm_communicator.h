// Collectives of one group over shared memory. Called by all ranks in the same order, by one thread of a rank at a
// time.
//
// Every call begins with the same rendezvous: each rank publishes what it calls, then reads what all others call, so a
// difference is an error on every rank. Messages up to a threshold travel with it (one-shot); longer ones run through a
// ring of cache-sized chunks. Results do not depend on which of the two was taken.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "comm/shm_layout.h"
#include "comm/shm_peers.h"
#include "comm/shm_reduce.h"
#include "comm/shm_segment.h"
#include "comm/shm_wait.h"
#include "common/dtype.h"
#include "common/status.h"

namespace tpk::shm {

enum class Operation : int { kNone = 0, kAllReduce, kReduceScatter, kAllGather, kBroadcast, kBarrier };
const char* name_of(Operation operation);

// Identity of the calling thread.
const void* this_thread();

// How many forks lie between the process that loaded the library and this one.
std::uint64_t forks();

// Facts of a failed call beyond its message.
struct Failure {
  std::string operation;
  std::uint64_t sequence = 0;
  std::uint64_t ranks = 0;  // bit r: rank r is concerned
};

class Communicator {
 public:
  Communicator(int rank, int world_size, std::string name);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Bootstrap: rank 0 creates, the others attach to what it published; activate() once every rank has done so.
  Status create(const std::string& directory, std::size_t one_shot_bytes, std::size_t chunk_bytes);
  Status attach(const Descriptor& descriptor);
  void activate();
  const Segment& segment() const { return segment_; }

  // The collectives. Pointers may be null only where there is nothing to read or write. `timeout` in seconds.
  // Counts are elements; `counts` holds one per rank.
  Status all_reduce(const void* in, void* out, std::size_t count, DType dtype, ReduceOp op, double timeout,
                    BlockingHooks& hooks);
  // `in` holds the ranks' parts one after the other.
  Status reduce_scatter(const void* in, void* out, const std::vector<std::size_t>& counts, DType dtype, ReduceOp op,
                        double timeout, BlockingHooks& hooks);
  // `out` has `rows` rows, each the concatenation of one row of every rank; counts are whole ranks', not rows'.
  Status all_gather(const void* in, void* out, std::size_t rows, const std::vector<std::size_t>& counts, DType dtype,
                    double timeout, BlockingHooks& hooks);
  Status broadcast(void* data, std::size_t count, DType dtype, int root, double timeout, BlockingHooks& hooks);
  Status barrier(double timeout, BlockingHooks& hooks);

  // Leaves the group: peers that wait for this rank are told. Not collective, idempotent, from any thread; a running
  // call is aborted first.
  void close(BlockingHooks& hooks);
  bool closed() const { return closed_.load(); }

  std::uint64_t sequence() const { return sequence_; }
  const Failure& failure() const { return failure_; }

 private:
  Status join();

  struct Call {
    Operation operation = Operation::kNone;
    DType dtype = DType::kFloat32;
    ReduceOp op = ReduceOp::kSum;
    int root = 0;
    std::uint64_t count = 0;
    std::uint64_t sizes = 0;
    std::uint64_t what() const {
      return static_cast<std::uint64_t>(operation) | static_cast<std::uint64_t>(dtype) << 8 |
             static_cast<std::uint64_t>(op) << 16 | static_cast<std::uint64_t>(root) << 24;
    }
  };
  class Running;  // marks the communicator busy for the length of a call

  // Life of a call.
  bool begin(const Call& call, double timeout, BlockingHooks& hooks);
  void publish_header();
  bool wait_headers();
  bool rendezvous() {
    publish_header();
    return wait_headers();
  }
  Status end(bool ok);

  // Waits until `word`, which rank `peer` advances, has reached `target`; false when the call failed.
  bool wait(int peer, const std::atomic<std::uint64_t>& word, std::uint64_t target) {
    return word.load(std::memory_order_acquire) >= target || wait_slow(peer, word, target);
  }
  bool wait_slow(int peer, const std::atomic<std::uint64_t>& word, std::uint64_t target);
  bool wait_all(std::atomic<std::uint64_t> Progress::* counter, std::uint64_t target);
  bool still_fine(int peer, const std::atomic<std::uint64_t>& word, std::uint64_t target, std::int64_t now);
  bool unfinished(int peer) const;

  // Failures: the first rank to fail writes the story that all others repeat.
  bool fail(Code code, std::string message, std::uint64_t ranks);
  bool abort(Cause cause, const std::string& text, std::uint64_t culprits);
  bool adopt_abort();
  bool fail_mismatch();
  std::string describe(std::uint64_t what, std::uint64_t count, std::uint64_t sizes) const;
  std::string call_text() const;

  // Message paths; each true on success.
  bool all_reduce_chunked(const char* in, char* out, std::size_t bytes);
  bool reduce_scatter_chunked(const char* in, char* out, const std::vector<std::size_t>& counts);
  bool all_gather_chunked(const char* in, const std::vector<std::size_t>& counts);
  bool broadcast_chunked(char* data, std::size_t bytes);
  bool end_chunks(std::uint64_t steps);
  void copy(void* dst, const void* src, std::size_t bytes, bool streaming) const;
  bool stage_streaming() const;
  static constexpr std::size_t kFarMinBytes = std::size_t{16} << 10;  // less says nothing about the rate
  void note_moved(std::size_t bytes);
  void reduce(void* dst, const void* const* src, std::size_t bytes, bool streaming) const;
  void place_gathered(int rank, std::size_t begin, std::size_t bytes, const char* src) const;

  CallHeader& header(int rank) const { return control_->headers[sequence_ & 1][rank]; }
  Progress& progress(int rank) const { return control_->progress[rank]; }

  const int rank_;
  const int world_size_;
  const std::string name_;
  const ReduceKernels& kernels_;
  Segment segment_;
  Layout layout_;
  Control* control_ = nullptr;
  Peers peers_;
  WaitPolicy policy_;
  std::size_t one_shot_limit_ = 0;
  std::uint64_t fork_generation_ = 0;
  std::atomic<bool> busy_{false};
  std::atomic<const void*> caller_{nullptr};  // this_thread() of the call that made it busy
  std::atomic<bool> closed_{true};
  bool active_ = false;
  std::mutex closing_;  // of several closing threads one unmaps

  std::uint64_t sequence_ = 0;
  std::uint64_t step_ = 0;  // chunks of all calls so far; the same on every rank
  std::string broken_;      // why no further call is accepted

  // The call in progress.
  Call call_;
  bool chunked_ = false;
  double timeout_ = 0;
  std::int64_t waiting_since_ = 0;  // 0: has not waited long enough to look at the clock
  std::int64_t next_look_ = 0;
  BlockingHooks* hooks_ = nullptr;
  Status status_;
  Failure failure_;

  // How fast staged data move between this rank and the others.
  std::int64_t busy_ns_ = 0;
  int slow_moves_ = 0;
  int streamed_moves_ = 0;

  // Where all_gather puts the ranks' data.
  struct GatherPlan {
    char* out = nullptr;
    std::size_t rows = 1;
    std::size_t row_stride = 0;
    std::size_t row_bytes[kMaxRanks] = {};
    std::size_t column[kMaxRanks] = {};
  } gather_;
};

}  // namespace tpk::shm
