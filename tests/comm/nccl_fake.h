// A CUDA runtime and an NCCL of make-believe, for nccl_fake_device.cpp. Streams are lists of operations; an operation
// that hangs holds up its stream until the communicator is aborted, as a kernel does that waits for a dead peer.
#pragma once

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <set>
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
// Registered buffers: what is there, what happened in which order, and what is to go wrong.
int memory_alive = 0;
std::set<void*> locals, windows;
std::string lifecycle;
std::atomic<bool> fail_alloc{false}, fail_register{false}, fail_window{false}, no_peer_access{false};
std::atomic<bool> stuck_in_window{false};
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

void happened(const char* what) {
  const std::lock_guard guard(lock);
  lifecycle += std::string(what) + " ";
}

Result register_in(std::set<void*>* known, const char* what, void** handle) {
  *handle = new int(0);
  {
    const std::lock_guard guard(lock);
    known->insert(*handle);
  }
  return happened(what), kSuccess;
}

Result deregister_from(std::set<void*>* known, const char* what, void* handle) {
  {
    const std::lock_guard guard(lock);
    if (known->erase(handle) != 1) return kInvalidUsage;
  }
  delete static_cast<int*>(handle);
  return happened(what), kSuccess;
}

// What ncclCommAbort and ncclCommDestroy do with what is still registered.
void forget_registrations() {
  const std::lock_guard guard(lock);
  for (auto* known : {&locals, &windows}) {
    for (void* handle : *known) delete static_cast<int*>(handle);
    known->clear();
  }
}

// version: 2.18 knows no registration, 2.19 no windows, 2.28 makes a window in any case, 2.29 only with peer access.
Library fake_library(int version = 22809) {
  Library library;
  library.version = version;
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
  f.CommFinalize = [](Comm) -> Result { return happened("finalize"), ++finalizes, kInProgress; };
  f.CommDestroy = [](Comm comm) -> Result {
    forget_registrations();
    return happened("destroy"), ++destroys, delete static_cast<int*>(comm), kSuccess;
  };
  f.CommAbort = [](Comm comm) -> Result {
    aborted = true;
    forget_registrations();
    happened("abort");
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
  if (version < 21900) return library;
  f.MemAlloc = [](void** address, std::size_t bytes) -> Result {
    if (fail_alloc) return kInvalidUsage;
    const std::lock_guard guard(lock);
    return ++memory_alive, *address = std::malloc(bytes), kSuccess;
  };
  f.MemFree = [](void* address) -> Result {
    happened("free");
    const std::lock_guard guard(lock);
    return --memory_alive, std::free(address), kSuccess;
  };
  f.CommRegister = [](Comm, void*, std::size_t, void** handle) -> Result {
    if (fail_register) return kInvalidArgument;
    return register_in(&locals, "register", handle);
  };
  f.CommDeregister = [](Comm, void* handle) -> Result { return deregister_from(&locals, "deregister", handle); };
  if (version < 22700) return library;
  f.CommWindowRegister = [](Comm, void*, std::size_t, void** handle, int flags) -> Result {
    while (stuck_in_window && !aborted) usleep(1000);
    if (fail_window || stuck_in_window || flags != 1) return kRemoteError;
    if (no_peer_access) return happened("nothing"), kSuccess;
    const Result result = register_in(&windows, "window", handle);
    return in_progress > 0 ? kInProgress : result;
  };
  f.CommWindowDeregister = [](Comm, void* handle) -> Result { return deregister_from(&windows, "unwindow", handle); };
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
