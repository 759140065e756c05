// Memory that NCCL allocates, and buffers registered with a communicator, which its transports then read and write in
// place instead of through buffers of their own. Only in CUDA builds.
//
// Two ways of registering. ncclCommRegister (2.19) is a local call; what the ranks have to tell each other waits for
// the first collective that can use it, and NVLink SHARP and direct copies between GPUs do. ncclCommWindowRegister
// (2.27) is a collective of all ranks; where every pair of GPUs of a host reaches each other it maps the buffer into
// all of them at once, which the symmetric kernels need. 2.28 makes a window where that is not so too, of a local
// registration; from 2.29 on it then succeeds without making one, so the local call must follow. 2.27 is not asked for
// windows: it also gives a handle for what it has not mapped, and none, but success, for memory that does not fit.
//
// A registration ends before the communicator is finalised, since both calls work on it. After ncclCommAbort nothing is
// deregistered: the call ends local registrations itself, and unmapping memory under a kernel that is being stopped
// would be an error of its own. Memory is freed after the communicator in every case, and only when the streams that
// were named as using it have come past what they held.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl_events.h"
#include "comm/nccl_library.h"
#include "comm/nccl_watchdog.h"
#include "common/status.h"

namespace tpk::nccl {

constexpr int kFirstVersionWithWindows = 22800;
constexpr int kWindowSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC

// Memory of ncclMemAlloc; freed with the last pointer to it, or never if something may still use it.
class Memory {
 public:
  static Status allocate(const Library& library, int device, std::size_t bytes, std::shared_ptr<Memory>* memory) {
    const Functions& f = library.call;
    if (f.MemAlloc == nullptr || f.MemFree == nullptr)
      return Status::Error(Code::kSystem, "NCCL " + version_text(library.version) + " has no ncclMemAlloc");
    const DeviceScope scope(device);
    const RelaxedCapture relaxed;
    void* address = nullptr;
    const Result result = f.MemAlloc(&address, bytes);
    if (result != kSuccess || address == nullptr) {
      cudaGetLastError();  // told here, and nobody else's
      return Status::Error(Code::kSystem, "ncclMemAlloc of " + std::to_string(bytes) +
                                              " bytes: " + f.GetErrorString(result) + details(f));
    }
    memory->reset(new Memory(f, device, address, bytes));
    return Status::Ok();
  }
  ~Memory() {
    if (kept_ || getpid() != pid_ || !quiet(kQuietSeconds)) return;
    const DeviceScope scope(device_);
    const RelaxedCapture relaxed;
    free_(address_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void keep() { kept_ = true; }
  // Kernels on this stream use it, which must outlive it.
  void used_on(cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
  }
  // Waits until those streams have come past what they hold now; false if one does not, or cannot be asked because it
  // is being captured.
  bool quiet(double seconds) {
    const std::lock_guard lock(mutex_);
    const DeviceScope scope(device_);
    const RelaxedCapture relaxed;
    bool all = true;
    for (const cudaStream_t stream : streams_) all = all && stream_is_quiet(stream, seconds);
    return all;
  }
  void* address() const { return address_; }
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr double kQuietSeconds = 2.0;

  Memory(const Functions& f, int device, void* address, std::size_t bytes)
      : free_(f.MemFree), device_(device), pid_(getpid()), address_(address), bytes_(bytes) {}

  static std::string details(const Functions& f) {
    const char* last = f.GetLastError(nullptr);
    return last != nullptr && *last != '\0' ? std::string(" (") + last + ")" : "";
  }

  static bool stream_is_quiet(cudaStream_t stream, double seconds) {
    cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    cudaEvent_t event = nullptr;
    cudaError_t result = cudaStreamGetCaptureInfo(stream, &state, &id);
    if (result == cudaSuccess && state != cudaStreamCaptureStatusNone) return false;
    if (result == cudaSuccess) result = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (result == cudaSuccess) result = cudaEventRecord(event, stream);
    if (result == cudaSuccess) result = cudaEventQuery(event);
    const bool at_once = result == cudaSuccess;
    const std::int64_t deadline = steady_now() + static_cast<std::int64_t>(seconds * 1e9);
    while (result == cudaErrorNotReady && steady_now() < deadline) {
      usleep(200);
      result = cudaEventQuery(event);
    }
    if (!at_once) cudaGetLastError();  // not ready is no error to be found by the next kernel launch
    if (event != nullptr) cudaEventDestroy(event);
    return result == cudaSuccess;
  }

  Result (*const free_)(void*);
  const int device_;
  const pid_t pid_;
  void* const address_;
  const std::size_t bytes_;
  std::atomic<bool> kept_{false};
  std::mutex mutex_;
  std::vector<cudaStream_t> streams_;
};

enum class Registered : int { kNone, kLocal, kWindow };

struct Registration {
  void* address = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<Memory> memory;  // null: the caller's own
  Registered kind = Registered::kNone;
  void* handle = nullptr;  // a thread of NCCL's may write here until the call is settled
};
using RegistrationPtr = std::shared_ptr<Registration>;

// The registrations of one communicator, and how many of them NCCL still knows.
class Registrations {
 public:
  RegistrationPtr add(void* address, std::size_t bytes, std::shared_ptr<Memory> memory) {
    auto made = std::make_shared<Registration>();
    made->address = address;
    made->bytes = bytes;
    made->memory = std::move(memory);
    const std::lock_guard lock(mutex_);
    list_.push_back(made);
    ++*alive_;
    return made;
  }
  RegistrationPtr find(const void* address) const {
    const std::lock_guard lock(mutex_);
    for (const RegistrationPtr& one : list_)
      if (one->address == address) return one;
    return nullptr;
  }
  // Forgets one that NCCL does not know, or no more.
  void remove(const RegistrationPtr& one) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find(list_.begin(), list_.end(), one);
    if (found == list_.end()) return;
    list_.erase(found);
    --*alive_;
  }
  // Something was put on this stream that may use any of them.
  void used_on(cudaStream_t stream) const {
    const std::lock_guard lock(mutex_);
    for (const RegistrationPtr& one : list_)
      if (one->memory != nullptr) one->memory->used_on(stream);
  }
  // For whoever ends the communicator: takes them all, and counts them off `alive` when they are ended.
  std::vector<RegistrationPtr> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(list_, {});
  }
  const std::shared_ptr<std::atomic<int>>& alive() const { return alive_; }

 private:
  mutable std::mutex mutex_;
  std::vector<RegistrationPtr> list_;
  const std::shared_ptr<std::atomic<int>> alive_ = std::make_shared<std::atomic<int>>(0);
};

// Not of memory that is still in use, for example by a graph that is being replayed: that is never freed, either.
inline Result deregister(const Functions& f, Comm comm, Registration* one, double seconds) {
  if (one->memory != nullptr && !one->memory->quiet(seconds)) return one->memory->keep(), kSuccess;
  void* handle = std::exchange(one->handle, nullptr);
  if (handle == nullptr) return kSuccess;
  return one->kind == Registered::kWindow ? f.CommWindowDeregister(comm, handle) : f.CommDeregister(comm, handle);
}

}  // namespace tpk::nccl
