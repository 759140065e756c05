#include "comm/nccl_communicator.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <limits>
#include <numeric>
#include <thread>
#include <utility>

namespace tpk::nccl {
namespace {

// Above so many operations in flight the caller itself looks which have ended, lest the pool of events grow.
constexpr std::size_t kRetireAbove = 64;
// How long ncclCommAbort may take before it is left to itself, and how long the thread inside a call is given to leave
// it.
constexpr double kAbortSeconds = 10.0;
constexpr std::chrono::seconds kLeaveCall{2};

std::int64_t nanoseconds(double seconds) { return static_cast<std::int64_t>(std::min(seconds, 1e9) * 1e9); }

Status cuda_error(const std::string& what, cudaError_t error) {
  return Status::Error(Code::kCuda, what + ": " + cudaGetErrorString(error));
}

const char* add_bytes(const void* address, std::size_t bytes) { return static_cast<const char*>(address) + bytes; }

}  // namespace

Communicator::Communicator(const Library& library, int rank, int world_size, int device, std::string group)
    : library_(library),
      rank_(rank),
      world_size_(world_size),
      device_(device),
      group_(std::move(group)),
      pid_(getpid()),
      events_(std::make_shared<EventPool>(device)),
      watchdog_({[this] { cudaSetDevice(device_); }, query_event, [this] { return library_error(); },
                 [this](const Failure&) { abort_now(); }}) {}

Communicator::~Communicator() { close(0); }

bool Communicator::forked() const { return getpid() != pid_; }

// Creation ------------------------------------------------------------------------------------------------------------

Status Communicator::start(const UniqueId& id, int max_ctas, bool blocking) {
  const DeviceScope scope(device_);
  Config config;
  config.blocking = blocking ? 1 : 0;
  if (max_ctas > 0) config.max_ctas = max_ctas;
  watchdog_.start();
  Comm comm = nullptr;
  const Result result = library_.call.CommInitRankConfig(&comm, world_size_, id, rank_, &config);
  comm_.store(comm);
  if (result == kSuccess || result == kInProgress) return Status::Ok();
  return break_with(Code::kSystem, Operation::kCreate, 0, "ncclCommInitRankConfig: " + explain(result));
}

Status Communicator::poll(bool* ready) {
  *ready = ready_;
  if (ready_) return Status::Ok();
  const std::lock_guard lock(calls_);
  if (Status status = usable(Operation::kCreate); !status.ok()) return status;
  Result state = kSuccess;
  const Result asked = library_.call.CommGetAsyncError(comm_, &state);
  if (asked != kSuccess) state = asked;
  if (state == kInProgress) return Status::Ok();
  if (state != kSuccess) return break_with(Code::kSystem, Operation::kCreate, 0, explain(state));
  const DeviceScope scope(device_);
  int lowest = 0, highest = 0;
  cudaDeviceGetStreamPriorityRange(&lowest, &highest);
  const cudaError_t error = cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest);
  if (error != cudaSuccess)
    return break_with(Code::kCuda, Operation::kCreate, 0,
                      std::string("cannot create a stream: ") + cudaGetErrorString(error));
  ready_ = *ready = true;
  return Status::Ok();
}

// Collectives ---------------------------------------------------------------------------------------------------------

Status Communicator::run(const Call& call, Handle* handle) {
  if (Status status = check_call(call); !status.ok()) return status;
  const std::lock_guard lock(calls_);
  if (Status status = usable(call.operation); !status.ok()) return status;
  if (!ready_) return Status::Error(Code::kInvalidArgument, where(call.operation) + ": not connected yet");
  const DeviceScope scope(device_);  // stream 0 is the current device's
  const std::uint64_t sequence = ++sequence_;
  const std::int64_t now = steady_now(), deadline = now + nanoseconds(call.timeout);
  watchdog_.flight().add({call.operation, sequence, now, deadline, nullptr});
  watchdog_.note_activity();
  Status status = enqueue(call, sequence, deadline, handle);
  if (!status.ok()) watchdog_.flight().drop(sequence);
  return status;
}

Status Communicator::enqueue(const Call& call, std::uint64_t sequence, std::int64_t deadline, Handle* handle) {
  unsigned long long capture = 0;
  if (Status status = capture_of(call.stream, call.operation, &capture); !status.ok()) return status;
  const bool captured = capture != 0;
  Flight& flight = watchdog_.flight();
  if (!captured && flight.size() > kRetireAbove) flight.retire(query_event, 32);

  std::string error;
  const cudaStream_t stream = call.asynchronous ? stream_ : call.stream;
  const auto end = events_->take(captured, &error);
  if (end == nullptr) return Status::Error(Code::kCuda, where(call.operation) + ": " + error);
  const auto end_event = static_cast<cudaEvent_t>(end.get());
  cudaError_t result = cudaSuccess;
  if (call.asynchronous) {
    // The end event serves for the fork as well: a wait refers to the record before it, not to later ones.
    result = cudaEventRecord(end_event, call.stream);
    if (result == cudaSuccess) result = cudaStreamWaitEvent(stream, end_event, 0);
  }
  const bool forked_after_last = call.asynchronous && last_.stream == call.stream;
  if (result == cudaSuccess && last_.event != nullptr && last_.stream != stream && last_.capture == capture &&
      !forked_after_last)
    result = cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(last_.event.get()), 0);
  if (result != cudaSuccess) return cuda_error(where(call.operation) + ": cannot order the streams", result);

  if (captured) captured_ = true;
  if (Status status = settle(launch(call, stream), call.operation, sequence, deadline); !status.ok()) return status;
  result = cudaEventRecord(end_event, stream);
  if (result != cudaSuccess)
    return break_with(Code::kCuda, call.operation, sequence,
                      std::string("cannot record the end event: ") + cudaGetErrorString(result));
  last_.event = end;
  last_.stream = stream;
  last_.capture = capture;
  handle->event = end;
  handle->capture = capture;
  if (captured)
    flight.drop(sequence);
  else
    flight.arm(sequence, end);
  return Status::Ok();
}

Result Communicator::launch(const Call& call, cudaStream_t stream) {
  const Functions& f = library_.call;
  const Comm comm = comm_.load();
  const auto& counts = call.counts;
  if (std::all_of(counts.begin(), counts.end(), [](std::size_t count) { return count == 0; })) return kSuccess;
  const bool even = std::all_of(counts.begin(), counts.end(), [&](std::size_t count) { return count == counts[0]; });
  switch (call.operation) {
    case Operation::kReduceScatter:
      if (!even) return launch_parts(call, stream);
      return f.ReduceScatter(call.in, call.out, counts[0], call.type, call.op, comm, stream);
    case Operation::kAllGather:
      if (!even) return launch_parts(call, stream);
      return f.AllGather(call.in, call.out, counts[0], call.type, comm, stream);
    case Operation::kBroadcast:
      return f.Broadcast(call.in, call.out, counts[0], call.type, call.root, comm, stream);
    default:
      return f.AllReduce(call.in, call.out, counts[0], call.type, call.op, comm, stream);
  }
}

// Uneven parts: one reduction or broadcast a rank, joined into one launch. It moves no more than the even forms do.
Result Communicator::launch_parts(const Call& call, cudaStream_t stream) {
  const Functions& f = library_.call;
  const Comm comm = comm_.load();
  Result result = f.GroupStart();
  if (result != kSuccess) return result;
  std::size_t offset = 0;
  for (int r = 0; r < world_size_; ++r) {
    const std::size_t count = call.counts[r];
    if (count == 0 || (result != kSuccess && result != kInProgress)) continue;
    if (call.operation == Operation::kReduceScatter) {
      const void* in = add_bytes(call.in, offset);
      result = f.Reduce(in, r == rank_ ? call.out : nullptr, count, call.type, call.op, r, comm, stream);
    } else {
      void* out = const_cast<char*>(add_bytes(call.out, offset));
      result = f.Broadcast(r == rank_ ? call.in : out, out, count, call.type, r, comm, stream);
    }
    offset += count * bytes_of(call.type);
  }
  const Result ended = f.GroupEnd();  // in any case, or the thread's later calls would never be launched
  return result == kSuccess || result == kInProgress ? ended : result;
}

// A non-blocking communicator launches from a thread of NCCL's; what comes next on the stream must wait for that.
Status Communicator::settle(Result result, Operation operation, std::uint64_t sequence, std::int64_t deadline) {
  const Comm comm = comm_.load();
  for (int asked = 0; result == kInProgress; ++asked) {
    if (watchdog_.failed()) return report(operation);
    if (steady_now() > deadline)
      return break_with(Code::kTimeout, operation, sequence,
                        std::string(name_of(operation)) + " (call " + std::to_string(sequence) +
                            ") could not be enqueued before its deadline");
    if (asked < 100)
      sched_yield();
    else
      usleep(20);
    Result state = kSuccess;
    result = library_.call.CommGetAsyncError(comm, &state);
    if (result == kSuccess) result = state;
  }
  if (result == kSuccess) return Status::Ok();
  return break_with(Code::kSystem, operation, sequence,
                    std::string(name_of(operation)) + " (call " + std::to_string(sequence) + "): " + explain(result));
}

// Handles and graphs --------------------------------------------------------------------------------------------------

Status Communicator::wait(const Handle& handle, cudaStream_t stream) {
  if (watchdog_.failed()) return report(Operation::kAllReduce);
  const DeviceScope scope(device_);
  unsigned long long capture = 0;
  if (Status status = capture_of(stream, Operation::kAllReduce, &capture); !status.ok()) return status;
  if (capture != handle.capture)
    return Status::Error(Code::kInvalidArgument,
                         "group " + group_ +
                             ": a handle must be waited for in the graph capture in which it was made, or outside "
                             "of captures if it was made outside");
  const cudaError_t result = cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(handle.event.get()), 0);
  return result == cudaSuccess ? Status::Ok() : cuda_error("group " + group_ + ": cannot wait for a handle", result);
}

Status Communicator::done(const Handle& handle, bool* done) {
  if (watchdog_.failed()) return report(Operation::kAllReduce);
  if (handle.capture != 0)
    return Status::Error(Code::kInvalidArgument, "group " + group_ + ": a captured operation runs when its graph does");
  std::string error;
  const Progress progress = query_event({Operation::kAllReduce, 0, 0, 0, handle.event}, &error);
  if (progress == Progress::kError) return Status::Error(Code::kCuda, "group " + group_ + ": " + error);
  *done = progress == Progress::kDone;
  return Status::Ok();
}

Status Communicator::guard_replay(cudaStream_t stream, double timeout) {
  const std::lock_guard lock(calls_);
  if (Status status = usable(Operation::kReplay); !status.ok()) return status;
  const DeviceScope scope(device_);
  unsigned long long capture = 0;
  if (Status status = capture_of(stream, Operation::kReplay, &capture); !status.ok()) return status;
  if (capture != 0) return Status::Error(Code::kInvalidArgument, where(Operation::kReplay) + ": cannot be captured");
  std::string error;
  const auto end = events_->take(false, &error);
  if (end == nullptr) return Status::Error(Code::kCuda, where(Operation::kReplay) + ": " + error);
  const cudaError_t result = cudaEventRecord(static_cast<cudaEvent_t>(end.get()), stream);
  if (result != cudaSuccess) return cuda_error(where(Operation::kReplay), result);
  registrations_.used_on(stream);
  const std::int64_t now = steady_now();
  watchdog_.flight().add_replay({Operation::kReplay, ++replays_, now, now + nanoseconds(timeout), end});
  watchdog_.note_activity();
  return Status::Ok();
}

Status Communicator::capture_of(cudaStream_t stream, Operation operation, unsigned long long* capture) const {
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t result = cudaStreamGetCaptureInfo(stream, &state, &id);
  if (result != cudaSuccess) return cuda_error(where(operation), result);
  if (state == cudaStreamCaptureStatusInvalidated)
    return Status::Error(Code::kCuda, where(operation) + ": the graph capture on this stream has failed before");
  *capture = state == cudaStreamCaptureStatusActive ? id : 0;
  return Status::Ok();
}

// Registered buffers --------------------------------------------------------------------------------------------------

Status Communicator::allocate(std::size_t bytes, std::shared_ptr<Memory>* memory) const {
  return Memory::allocate(library_, device_, bytes, memory);
}

Status Communicator::register_buffer(void* address, std::size_t bytes, bool window, std::shared_ptr<Memory> memory,
                                     double timeout, Registered* kind) {
  const Functions& f = library_.call;
  const auto refuse = [&](const std::string& what) {
    return Status::Error(Code::kInvalidArgument, where(Operation::kRegister) + ": " + what);
  };
  *kind = Registered::kNone;
  if (address == nullptr || bytes == 0) return refuse("an empty buffer");
  if (f.CommRegister == nullptr || f.CommDeregister == nullptr)
    return Status::Error(Code::kSystem, "NCCL " + version_text(library_.version) + " has no ncclCommRegister");
  window = window && library_.version >= kFirstVersionWithWindows && f.CommWindowRegister != nullptr &&
           f.CommWindowDeregister != nullptr;
  const std::lock_guard lock(calls_);
  if (Status status = usable(Operation::kRegister); !status.ok()) return status;
  if (!ready_) return refuse("not connected yet");
  if (registrations_.find(address) != nullptr) return refuse("the buffer is registered already");
  const DeviceScope scope(device_);
  const RelaxedCapture relaxed;
  const std::uint64_t sequence = ++sequence_;
  const std::int64_t now = steady_now(), deadline = now + nanoseconds(timeout);
  watchdog_.flight().add({Operation::kRegister, sequence, now, deadline, nullptr});
  watchdog_.note_activity();
  // Known from here on: if the call is given up, NCCL may still write the handle until it is aborted.
  const RegistrationPtr made = registrations_.add(address, bytes, std::move(memory));
  Status status;
  if (window) {
    const Result result = f.CommWindowRegister(comm_, address, bytes, &made->handle, kWindowSymmetric);
    status = settle(result, Operation::kRegister, sequence, deadline);
    if (status.ok() && made->handle != nullptr) made->kind = Registered::kWindow;
  }
  if (status.ok() && made->handle == nullptr) {
    const Result result = f.CommRegister(comm_, address, bytes, &made->handle);
    if (result != kSuccess) made->handle = nullptr;
    if (result == kSuccess && made->handle != nullptr) made->kind = Registered::kLocal;
    if (result != kSuccess)
      status = Status::Error(Code::kSystem, where(Operation::kRegister) + ": ncclCommRegister: " + explain(result));
  }
  watchdog_.flight().drop(sequence);
  *kind = made->kind;
  if (*kind == Registered::kNone && !watchdog_.failed()) registrations_.remove(made);
  return status;
}

Status Communicator::deregister_buffer(const void* address, double timeout) {
  const bool drained = drain(steady_now() + nanoseconds(timeout));
  const std::lock_guard lock(calls_);
  if (Status status = usable(Operation::kRegister); !status.ok()) return status;
  const RegistrationPtr one = registrations_.find(address);
  if (one == nullptr)
    return Status::Error(Code::kInvalidArgument, where(Operation::kRegister) + ": the buffer is not registered");
  if (!drained) return Status::Error(Code::kTimeout, where(Operation::kRegister) + ": collectives are still in flight");
  const DeviceScope scope(device_);
  const RelaxedCapture relaxed;
  const Result result = deregister(library_.call, comm_, one.get(), timeout);
  if (result != kSuccess)
    return break_with(Code::kSystem, Operation::kRegister, sequence_, "deregistering: " + explain(result));
  registrations_.remove(one);
  return Status::Ok();
}

// Failures ------------------------------------------------------------------------------------------------------------

std::string Communicator::where(Operation operation) const {
  return "group " + group_ + ": " + name_of(operation) + " on rank " + std::to_string(rank_) + " of " +
         std::to_string(world_size_);
}

Status Communicator::usable(Operation operation) {
  if (forked())
    return Status::Error(Code::kAborted,
                         where(operation) + ": the communicator belongs to the process from which this one was forked");
  if (watchdog_.failed()) return report(operation);
  if (closed_) return Status::Error(Code::kAborted, where(operation) + " refused, because the communicator is closed");
  return Status::Ok();
}

// The failure itself the first time, and that the communicator is broken from then on.
Status Communicator::report(Operation operation) {
  if (!reported_.exchange(true)) return check();
  return Status::Error(Code::kAborted,
                       where(operation) + " refused, because the communicator is broken: " + watchdog_.failure()->what);
}

Status Communicator::check() {
  const auto failure = watchdog_.failure();
  if (!failure) return Status::Ok();
  reported_ = true;
  return Status::Error(failure->code, where(failure->operation) + ": " + failure->what);
}

Status Communicator::break_with(Code code, Operation operation, std::uint64_t sequence, std::string what) {
  watchdog_.fail({code, operation, sequence, std::move(what)});
  return report(operation);
}

void Communicator::abort(const std::string& why) {
  if (!forked() && !closed_) watchdog_.fail({Code::kAborted, Operation::kAllReduce, sequence_.load(), why});
}

std::string Communicator::explain(Result result) const {
  std::string text = library_.call.GetErrorString(result);
  if (const char* last = library_.call.GetLastError(comm_.load()); last != nullptr && *last != '\0')
    text += std::string(" (") + last + ")";
  return text;
}

// Called by the watchdog. NCCL completes asynchronous work in this call, so no other may be under way.
std::string Communicator::library_error() {
  const std::unique_lock lock(calls_, std::try_to_lock);
  const Comm comm = comm_.load();
  if (!lock.owns_lock() || comm == nullptr || !ready_) return "";
  Result state = kSuccess;
  const Result asked = library_.call.CommGetAsyncError(comm, &state);
  if (asked != kSuccess) state = asked;
  return state == kSuccess || state == kInProgress ? "" : "NCCL reports: " + explain(state);
}

// Release -------------------------------------------------------------------------------------------------------------

// A thread that waits inside settle() leaves it at once when it sees the failure. One that is stuck in NCCL itself, for
// example because the device's queue is full behind a kernel that waits for a dead peer, gets out only by the abort.
void Communicator::abort_now() {
  const bool locked = calls_.try_lock_for(kLeaveCall);
  const Comm comm = comm_.exchange(nullptr);
  if (locked) calls_.unlock();
  release(comm, false, kAbortSeconds);
}

// In a thread of its own, because none of these calls has a deadline: destroying waits for the other ranks of the host
// to do the same, and for every graph that holds the communicator to be destroyed.
void Communicator::release(Comm comm, bool gracefully, double grace) {
  if (comm == nullptr) return;
  auto registrations = registrations_.take();
  const auto alive = registrations_.alive();
  auto finished = std::make_shared<std::promise<void>>();
  auto future = finished->get_future();
  const bool in_graphs = captured_;
  std::thread([f = library_.call, device = device_, comm, gracefully, in_graphs, finished, grace, alive,
               registrations = std::move(registrations)]() mutable {
    cudaSetDevice(device);
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    Result state = kRemoteError;
    const int registered = static_cast<int>(registrations.size());
    if (gracefully) {
      for (const RegistrationPtr& one : registrations) deregister(f, comm, one.get(), grace / 2);
      *alive -= registered;
      const std::int64_t deadline =
          in_graphs ? std::numeric_limits<std::int64_t>::max() : steady_now() + nanoseconds(std::max(grace, 5.0));
      state = f.CommFinalize(comm);
      for (int pause = 200; state == kInProgress && steady_now() < deadline; pause = std::min(2 * pause, 50000)) {
        usleep(static_cast<useconds_t>(pause));
        if (f.CommGetAsyncError(comm, &state) != kSuccess) state = kRemoteError;
      }
    }
    if (state == kSuccess)
      f.CommDestroy(comm);
    else
      f.CommAbort(comm);
    if (!gracefully) *alive -= registered;
    registrations.clear();  // frees memory that nobody else holds
    finished->set_value();
  }).detach();
  future.wait_for(std::chrono::nanoseconds(nanoseconds(in_graphs ? std::min(grace, 0.2) : grace)));
}

// Waits for what is in flight; false if it has not ended by the deadline.
bool Communicator::drain(std::int64_t deadline) {
  Flight& flight = watchdog_.flight();
  while (flight.size() > 0 && !watchdog_.failed()) {
    if (flight.review(steady_now(), query_event) || flight.size() == 0 || steady_now() >= deadline) break;
    usleep(200);
  }
  return flight.size() == 0 && !watchdog_.failed();
}

void Communicator::close(double grace) {
  if (forked() || closed_.exchange(true)) return;
  const bool clean = drain(steady_now() + nanoseconds(grace)) && ready_;
  watchdog_.stop();
  Comm comm = nullptr;
  {
    // A call that another thread is in ends by its own deadline.
    const std::lock_guard lock(calls_);
    comm = comm_.exchange(nullptr);
    last_.event.reset();
  }
  release(comm, clean, std::max(grace, 1.0));
  if (stream_ != nullptr) {
    const RelaxedCapture relaxed;
    cudaStreamDestroy(stream_);
    stream_ = nullptr;
  }
}

Status Communicator::check_call(const Call& call) const {
  const auto invalid = [&](const std::string& what) {
    return Status::Error(Code::kInvalidArgument, std::string(name_of(call.operation)) + ": " + what);
  };
  if (call.type < 0 || call.type >= kNumDataTypes) return invalid("unknown dtype code " + std::to_string(call.type));
  if (call.type >= kFloat8e4m3 && library_.version < kFirstVersionWithFloat8)
    return invalid("fp8 needs NCCL " + version_text(kFirstVersionWithFloat8) + ", this is " +
                   version_text(library_.version));
  if (call.op != kSum && call.op != kMax) return invalid("unknown reduction code " + std::to_string(call.op));
  if (call.root < 0 || call.root >= world_size_) return invalid("root is not a rank of the group");
  if (!(call.timeout > 0)) return invalid("the timeout must be positive");
  const bool parts = call.operation == Operation::kReduceScatter || call.operation == Operation::kAllGather;
  if (call.operation > Operation::kBarrier || call.operation < Operation::kAllReduce) return invalid("no collective");
  if (call.counts.size() != (parts ? static_cast<std::size_t>(world_size_) : 1)) return invalid("one count per rank");
  const std::size_t total = std::accumulate(call.counts.begin(), call.counts.end(), std::size_t{0});
  const std::size_t mine = call.counts[parts ? rank_ : 0];
  const bool scatters = call.operation == Operation::kReduceScatter, gathers = call.operation == Operation::kAllGather;
  if (call.in == nullptr && (gathers ? mine : total) > 0) return invalid("the input address is null");
  if (call.out == nullptr && (scatters ? mine : total) > 0) return invalid("the output address is null");
  return Status::Ok();
}

}  // namespace tpk::nccl
