// A CUDA runtime and an NCCL of make-believe, and the checks of csrc/comm/nccl_communicator.cpp that run on them.
// Built and run by test_nccl_communicator.py. Streams are lists of operations; an operation that hangs holds up its
// stream until the communicator is aborted, as a kernel does that waits for a dead peer.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/nccl_communicator.h"

using namespace tpk;
using namespace tpk::nccl;

namespace {

struct FakeStream {
  int submitted = 0;
  int stuck_at = 0;  // index of the operation that hangs, 0: none
  unsigned long long capture = 0;
};
struct FakeEvent {
  FakeStream* stream = nullptr;
  int index = 0;
  unsigned long long capture = 0;
};

std::mutex lock;
std::string journal;
std::map<const void*, std::string> names;
int events_alive = 0, streams_alive = 0, queries_of_captured = 0, aborts = 0, destroys = 0, finalizes = 0;
std::atomic<bool> hang{false}, stuck_in_launch{false}, aborted{false};
std::atomic<int> in_progress{0};  // how often the communicator says that it is
std::atomic<int> async_error{0};
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

FakeStream* stream_of(cudaStream_t stream) { return reinterpret_cast<FakeStream*>(stream); }
FakeEvent* event_of(cudaEvent_t event) { return reinterpret_cast<FakeEvent*>(event); }
std::string name(const void* stream) {
  const auto found = names.find(stream);
  return found != names.end() ? found->second : "unnamed";
}

Result collective(const char* what, std::size_t count, void* stream) {
  while (stuck_in_launch && !aborted) usleep(1000);
  const std::lock_guard guard(lock);
  auto* s = static_cast<FakeStream*>(stream);
  ++s->submitted;
  if (hang && s->stuck_at == 0) s->stuck_at = s->submitted;
  journal += std::string(what) + std::to_string(count) + "@" + name(s) + " ";
  return in_progress > 0 ? kInProgress : kSuccess;
}

Library fake_library() {
  Library library;
  library.version = 22809;
  Functions& f = library.call;
  f.CommInitRankConfig = [](Comm* comm, int, UniqueId, int, Config* config) -> Result {
    *comm = new int(0);
    return config->blocking == 0 ? kInProgress : kSuccess;
  };
  f.CommGetAsyncError = [](Comm, Result* state) -> Result {
    *state = in_progress > 0 ? kInProgress : static_cast<Result>(async_error.load());
    if (in_progress > 0) --in_progress;
    return kSuccess;
  };
  f.CommFinalize = [](Comm) -> Result { return ++finalizes, kInProgress; };
  f.CommDestroy = [](Comm comm) -> Result { return ++destroys, delete static_cast<int*>(comm), kSuccess; };
  f.CommAbort = [](Comm comm) -> Result {
    aborted = true;
    return ++aborts, delete static_cast<int*>(comm), kSuccess;
  };
  f.GetErrorString = [](Result) -> const char* { return "an error of NCCL"; };
  f.GetLastError = [](Comm) -> const char* { return "its details"; };
  f.AllReduce = [](const void*, void*, std::size_t n, DataType, RedOp, Comm, Stream s) {
    return collective("all_reduce", n, s);
  };
  f.ReduceScatter = [](const void*, void*, std::size_t n, DataType, RedOp, Comm, Stream s) {
    return collective("reduce_scatter", n, s);
  };
  f.AllGather = [](const void*, void*, std::size_t n, DataType, Comm, Stream s) {
    return collective("all_gather", n, s);
  };
  f.Broadcast = [](const void*, void*, std::size_t n, DataType, int, Comm, Stream s) {
    return collective("broadcast", n, s);
  };
  f.Reduce = [](const void*, void*, std::size_t n, DataType, RedOp, int, Comm, Stream s) {
    return collective("reduce", n, s);
  };
  f.GroupStart = []() -> Result { return journal += "( ", kSuccess; };
  f.GroupEnd = []() -> Result { return journal += ") ", kSuccess; };
  return library;
}

}  // namespace

// The runtime
// -----------------------------------------------------------------------------------------------------------

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "a CUDA error"; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  return std::swap(mode, *other), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  return *lowest = 0, *highest = -5, cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new FakeStream);
  return ++streams_alive, cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard guard(lock);
  names.erase(stream);
  return --streams_alive, delete stream_of(stream), cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, std::size_t*) {
  *id = stream_of(stream)->capture;
  *status = *id != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new FakeEvent);
  const std::lock_guard guard(lock);
  return ++events_alive, cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard guard(lock);
  return --events_alive, delete event_of(event), cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard guard(lock);
  *event_of(event) = {stream_of(stream), stream_of(stream)->submitted, stream_of(stream)->capture};
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard guard(lock);
  FakeEvent* e = event_of(event);
  FakeStream* s = stream_of(stream);
  if (e->capture != 0 && s->capture == 0) s->capture = e->capture;  // joins the capture
  if (e->capture != s->capture) return cudaErrorStreamCaptureIsolation;
  journal += name(s) + "<" + name(e->stream) + ":" + std::to_string(e->index) + " ";
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard guard(lock);
  FakeEvent* e = event_of(event);
  if (e->capture != 0) return ++queries_of_captured, cudaErrorCapturedEvent;
  if (mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  const int stuck = e->stream->stuck_at;
  return stuck == 0 || e->index < stuck || aborted ? cudaSuccess : cudaErrorNotReady;
}
}

// The checks
// -------------------------------------------------------------------------------------------------------------

namespace {

int failures = 0;
#define EXPECT(condition)                                                             \
  if (!(condition)) {                                                                 \
    ++failures;                                                                       \
    std::printf("line %d: %s; journal: %s\n", __LINE__, #condition, journal.c_str()); \
  }

const Library kLibrary = fake_library();
int device_memory[4];

struct World {
  explicit World(bool blocking = false) : communicator(kLibrary, 1, 3, 0, "g") {
    seen();
    hang = stuck_in_launch = aborted = false;
    async_error = 0;
    in_progress = 2;
    UniqueId id{};
    bool ready = false;
    EXPECT(communicator.start(id, 0, blocking).ok());
    for (int asked = 0; !ready && asked < 10; ++asked) EXPECT(communicator.poll(&ready).ok());
    EXPECT(ready);
    const std::lock_guard guard(lock);
    names = {{&one, "one"}, {&two, "two"}, {communicator.stream(), "own"}};
  }
  Status run(Operation operation, FakeStream& stream, bool asynchronous = false, double timeout = 60,
             std::vector<std::size_t> counts = {5}, Handle* handle = nullptr) {
    Handle other;
    Call call{operation,
              device_memory,
              device_memory + 1,
              counts,
              kFloat32,
              kSum,
              0,
              reinterpret_cast<cudaStream_t>(&stream),
              asynchronous,
              timeout};
    return communicator.run(call, handle != nullptr ? handle : &other);
  }
  std::string seen() {
    const std::lock_guard guard(lock);
    return std::exchange(journal, "");
  }
  // The first error that check() gives within `seconds`.
  Status failure(double seconds) {
    Status status;
    for (int i = 0; i < seconds * 1000 && status.ok(); ++i) {
      usleep(1000);
      status = communicator.check();
    }
    return status;
  }
  FakeStream one, two;
  Communicator communicator;
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void order_of_streams() {
  World w;
  EXPECT(w.run(Operation::kAllReduce, w.one).ok());
  EXPECT(w.seen() == "all_reduce5@one ");
  EXPECT(w.run(Operation::kAllReduce, w.two).ok());
  EXPECT(w.seen() == "two<one:1 all_reduce5@two ");
  Handle handle;
  EXPECT(w.run(Operation::kAllReduce, w.one, true, 60, {5}, &handle).ok());
  EXPECT(w.seen() == "own<one:1 own<two:1 all_reduce5@own ");
  EXPECT(w.run(Operation::kAllReduce, w.one, true).ok());
  EXPECT(w.seen() == "own<one:1 all_reduce5@own ");
  EXPECT(w.run(Operation::kBroadcast, w.one).ok());
  EXPECT(w.seen() == "one<own:2 broadcast5@one ");
  EXPECT(w.run(Operation::kAllReduce, w.one, true).ok());
  EXPECT(w.seen() == "own<one:2 all_reduce5@own ");
  EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.two)).ok());
  EXPECT(w.seen() == "two<own:1 ");
}

void uneven_parts() {
  World w;
  EXPECT(w.run(Operation::kReduceScatter, w.one, false, 60, {4, 4, 4}).ok());
  EXPECT(w.seen() == "reduce_scatter4@one ");
  EXPECT(w.run(Operation::kReduceScatter, w.one, false, 60, {4, 0, 3}).ok());
  EXPECT(w.seen() == "( reduce4@one reduce3@one ) ");
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {1, 2, 3}).ok());
  EXPECT(w.seen() == "( broadcast1@one broadcast2@one broadcast3@one ) ");
  EXPECT(w.run(Operation::kAllReduce, w.one, false, 60, {0}).ok());
  EXPECT(w.seen().empty());
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {1}).code == Code::kInvalidArgument);
}

void captures() {
  for (const int calls : {1, 2, 3}) {
    World w;
    EXPECT(w.run(Operation::kAllReduce, w.two).ok());
    w.seen();
    for (unsigned long long capture = 7; capture < 10; ++capture) {
      w.one.capture = capture;
      stream_of(w.communicator.stream())->capture = 0;  // CUDA takes the forked stream out of the last capture
      Handle handle;
      for (int i = 0; i < calls; ++i) EXPECT(w.run(Operation::kAllReduce, w.one, true, 60, {5}, &handle).ok());
      EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one)).ok());
      EXPECT(!contains(w.seen(), "<two"));
      w.one.capture = stream_of(w.communicator.stream())->capture = 0;
      EXPECT(w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one)).code == Code::kInvalidArgument);
      bool done = false;
      EXPECT(w.communicator.done(handle, &done).code == Code::kInvalidArgument);
      for (int i = 0; i < calls; ++i) EXPECT(w.run(Operation::kAllReduce, w.one, i % 2 == 0).ok());
      w.seen();
    }
    usleep(120000);
    EXPECT(w.communicator.check().ok());
    EXPECT(w.communicator.guard_replay(reinterpret_cast<cudaStream_t>(&w.one), 0.1).ok());
    usleep(200000);
    EXPECT(w.communicator.check().ok());
    EXPECT(queries_of_captured == 0);
    w.one.submitted = w.one.stuck_at = 100;
    EXPECT(w.communicator.guard_replay(reinterpret_cast<cudaStream_t>(&w.one), 0.1).ok());
    EXPECT(contains(w.failure(2).message, "graph replay (number 2) has not ended"));
  }
}

void deadline_passes() {
  for (const bool blocking : {false, true}) {
    World w(blocking);
    EXPECT(w.run(Operation::kBroadcast, w.one).ok());
    hang = true;
    const int before = aborts;
    Handle handle;
    EXPECT(w.run(Operation::kAllReduce, w.one, true, 0.2, {5}, &handle).ok());
    EXPECT(w.run(Operation::kAllReduce, w.two).ok());
    const Status status = w.failure(3);
    EXPECT(status.code == Code::kTimeout &&
           contains(status.message, "group g: all_reduce on rank 1 of 3: all_reduce (call 2) has not ended"));
    const Status first = w.communicator.wait(handle, reinterpret_cast<cudaStream_t>(&w.one));
    EXPECT(first.code == Code::kAborted && w.failure(1).code == Code::kTimeout);
    EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
    w.communicator.close(1);
    EXPECT(aborts == before + 1);
  }
}

void library_reports() {
  World w;
  hang = true;
  EXPECT(w.run(Operation::kAllGather, w.one, false, 60, {5, 5, 5}).ok());
  async_error = kRemoteError;
  while (!aborted) usleep(1000);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kSystem);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
  const Status status = w.failure(3);
  EXPECT(status.code == Code::kSystem && contains(status.message, "all_gather on rank 1") &&
         contains(status.message, "an error of NCCL (its details)"));
}

void enqueuing_hangs() {
  {
    World w;
    in_progress = 1 << 30;  // a lazy connection to a rank that is gone
    const Status status = w.run(Operation::kAllReduce, w.one, false, 0.2);
    EXPECT(status.code == Code::kTimeout && contains(status.message, "could not be enqueued"));
    in_progress = 0;
  }
  World w(true);
  stuck_in_launch = true;  // the device's queue is full
  const Status status = w.run(Operation::kAllReduce, w.one, false, 0.2);
  EXPECT(contains(w.communicator.check().message, "could not be enqueued"));
  EXPECT(aborted);
}

void nothing_grows() {
  const int events = events_alive, streams = streams_alive, before = destroys;
  for (int i = 0; i < 100; ++i) {
    World w;
    for (int call = 0; call < 3; ++call) EXPECT(w.run(Operation::kAllReduce, w.one, call == 1).ok());
    if (i % 2 == 0) w.communicator.close(1);
    if (i % 4 == 0) w.communicator.close(1);
  }
  EXPECT(events_alive == events && streams_alive == streams && destroys == before + 100);
  World w;
  for (int call = 0; call < 5000; ++call) EXPECT(w.run(Operation::kAllReduce, w.one, call % 3 == 0).ok());
  EXPECT(w.communicator.events_created() < 200);
  w.communicator.close(1);
  EXPECT(w.run(Operation::kAllReduce, w.one).code == Code::kAborted);
  Handle late;
  {
    World short_lived;
    EXPECT(short_lived.run(Operation::kAllReduce, short_lived.one, true, 60, {5}, &late).ok());
  }
  EXPECT(late.event != nullptr);  // the pool outlives its owner
}

void several_threads() {
  World w;
  std::vector<std::thread> threads;
  FakeStream streams[4];
  for (FakeStream& stream : streams)
    threads.emplace_back([&w, &stream] {
      for (int call = 0; call < 2000; ++call) EXPECT(w.run(Operation::kAllReduce, stream, call % 2 == 0).ok());
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(w.communicator.sequence() == 8000 && w.communicator.check().ok());
  w.communicator.close(1);
}

}  // namespace

int main() {
  for (auto check : {order_of_streams, uneven_parts, captures, deadline_passes, library_reports, enqueuing_hangs,
                     nothing_grows, several_threads})
    check();
  std::printf("%d failures\n", failures);
  std::fflush(stdout);
  std::_Exit(failures != 0);
}
