// Collectives of one group through NCCL: a communicator, a high-priority stream and events of its own, and a watchdog
// that aborts it when an operation passes its deadline or NCCL reports an error. Only in CUDA builds.
//
// Order: a synchronous collective is enqueued on the caller's stream. An asynchronous one runs on the communicator's
// own stream, which first waits for the caller's; its handle makes another stream wait for the result. When the stream
// changes from one operation to the next, the new one waits for the old: the ranks' kernels start in the order of the
// calls. Nothing here blocks the host but for the enqueuing, which is bounded by the deadline too.
//
// Graphs: every call can be captured. Events of a capture stay in it, and operations in it are not watched; a replay
// is, after guard_replay().
#pragma once

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/nccl_buffers.h"
#include "comm/nccl_events.h"
#include "comm/nccl_library.h"
#include "comm/nccl_watchdog.h"
#include "common/status.h"

namespace tpk::nccl {

// Made by an asynchronous collective; `event` ends it. `capture` is 0 outside a graph capture.
struct Handle {
  std::shared_ptr<void> event;
  unsigned long long capture = 0;
};

// One collective. `counts` holds the elements of each rank's part for reduce_scatter and all_gather, and the number of
// elements alone for the others. `in` and `out` may be equal where NCCL allows it.
struct Call {
  Operation operation = Operation::kAllReduce;
  const void* in = nullptr;
  void* out = nullptr;
  std::vector<std::size_t> counts;
  DataType type = kFloat32;
  RedOp op = kSum;
  int root = 0;
  cudaStream_t stream = nullptr;  // the caller's
  bool asynchronous = false;
  double timeout = 0;  // seconds
};

class Communicator {
 public:
  Communicator(const Library& library, int rank, int world_size, int device, std::string group);
  ~Communicator();  // as close(0)
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Creation: start() begins to connect, poll() is asked until it is ready. max_ctas 0: NCCL's own choice. With
  // `blocking`, start() returns only when connected, and later calls launch from the calling thread.
  Status start(const UniqueId& id, int max_ctas, bool blocking);
  Status poll(bool* ready);

  Status run(const Call& call, Handle* handle);
  // Makes `stream` wait for the operation.
  Status wait(const Handle& handle, cudaStream_t stream);
  // Whether the operation has ended; not for one that was captured.
  Status done(const Handle& handle, bool* done);
  // Watches what has been put on `stream` so far, for `timeout` seconds.
  Status guard_replay(cudaStream_t stream, double timeout);

  // Memory that NCCL can register best; does not touch the communicator.
  Status allocate(std::size_t bytes, std::shared_ptr<Memory>* memory) const;
  // Registers a buffer, outside of graph captures. With `window` all ranks call it together, and an error breaks the
  // communicator; without, it is a local call whose errors do not. `memory` is what the buffer lies in, if it came from
  // allocate(). kNone: NCCL took the call, and made nothing of it.
  Status register_buffer(void* address, std::size_t bytes, bool window, std::shared_ptr<Memory> memory, double timeout,
                         Registered* kind);
  // Ends a registration, when what is in flight has ended; gives up after `timeout` seconds.
  Status deregister_buffer(const void* address, double timeout);
  // Registrations that NCCL may still know: memory of the caller's own must stay until there are none.
  int registrations() const { return registrations_.alive()->load(); }

  // The failure that broke the communicator, or Ok. Other calls return the failure only if nobody has seen it yet, and
  // kAborted afterwards.
  Status check();
  // Breaks it from outside, for example because a peer was seen to have died.
  void abort(const std::string& why);
  // True in a child of fork(), where not even the destructor may run.
  bool forked() const;
  // Releases everything. Waits up to `grace` seconds for what is in flight, and then aborts it.
  void close(double grace);

  cudaStream_t stream() const { return stream_; }
  std::uint64_t sequence() const { return sequence_.load(); }
  std::size_t in_flight() { return watchdog_.flight().size(); }
  std::size_t events_created() const { return events_->created(); }
  std::optional<Failure> failure() const { return watchdog_.failure(); }

 private:
  Status usable(Operation operation);
  Status report(Operation operation);
  std::string where(Operation operation) const;
  Status check_call(const Call& call) const;
  Status enqueue(const Call& call, std::uint64_t sequence, std::int64_t deadline, Handle* handle);
  Result launch(const Call& call, cudaStream_t stream);
  Result launch_parts(const Call& call, cudaStream_t stream);
  Status settle(Result result, Operation operation, std::uint64_t sequence, std::int64_t deadline);
  Status break_with(Code code, Operation operation, std::uint64_t sequence, std::string what);
  Status capture_of(cudaStream_t stream, Operation operation, unsigned long long* capture) const;
  std::string explain(Result result) const;
  std::string library_error();
  bool drain(std::int64_t deadline);
  void abort_now();
  void release(Comm comm, bool gracefully, double grace);

  const Library& library_;
  const int rank_, world_size_, device_;
  const std::string group_;
  const pid_t pid_;  // a forked child must touch neither CUDA nor the watchdog
  std::shared_ptr<EventPool> events_;
  cudaStream_t stream_ = nullptr;

  std::timed_mutex calls_;  // held while NCCL works on comm_, except to abort it
  std::atomic<Comm> comm_{nullptr};
  std::atomic<bool> ready_{false};
  std::atomic<bool> captured_{false};  // a graph may hold on to the communicator
  std::atomic<bool> closed_{false};
  std::atomic<bool> reported_{false};
  std::atomic<std::uint64_t> sequence_{0};
  std::uint64_t replays_ = 0;
  Registrations registrations_;
  struct {
    std::shared_ptr<void> event;
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;
  } last_;  // the operation before

  Watchdog watchdog_;  // last: its thread uses the others
};

}  // namespace tpk::nccl
