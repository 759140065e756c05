// A pool of timing-free CUDA events, so that a collective creates none. Only in CUDA builds.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/nccl_flight.h"

namespace tpk::nccl {

// For this scope, calls that a capture elsewhere in the process would forbid (queries of events among them) neither
// fail nor break that capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes `device` current for this scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Outlives its owner for as long as an event is lent. Events recorded while a graph is captured are kept apart from the
// others: querying one, or waiting for it outside that capture, is an error, so they must never be mistaken.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  explicit EventPool(int device) : device_(device) {}
  ~EventPool() {
    for (auto& list : free_)
      for (cudaEvent_t event : list) cudaEventDestroy(event);
  }

  // An event, returned to the pool when the last copy of the pointer is gone; nullptr if CUDA refuses to make one.
  std::shared_ptr<void> take(bool captured, std::string* error) {
    cudaEvent_t event = nullptr;
    {
      const std::lock_guard lock(mutex_);
      auto& list = free_[captured];
      if (!list.empty()) {
        event = list.back();
        list.pop_back();
      }
    }
    if (event == nullptr) {
      const DeviceScope scope(device_);
      const cudaError_t result = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      if (result != cudaSuccess) {
        *error = std::string("cannot create an event: ") + cudaGetErrorString(result);
        return nullptr;
      }
      const std::lock_guard lock(mutex_);
      ++created_;
    }
    return {static_cast<void*>(event), [pool = shared_from_this(), captured](void* lent) {
              const std::lock_guard lock(pool->mutex_);
              pool->free_[captured].push_back(static_cast<cudaEvent_t>(lent));
            }};
  }

  std::size_t created() const {
    const std::lock_guard lock(mutex_);
    return created_;
  }

 private:
  const int device_;
  mutable std::mutex mutex_;
  std::vector<cudaEvent_t> free_[2];  // [captured]
  std::size_t created_ = 0;
};

// What the device says about an operation whose end event is the entry's token.
inline Progress query_event(const Entry& entry, std::string* error) {
  const RelaxedCapture relaxed;
  const cudaError_t result = cudaEventQuery(static_cast<cudaEvent_t>(entry.token.get()));
  if (result == cudaSuccess) return Progress::kDone;
  if (result == cudaErrorNotReady) {
    cudaGetLastError();  // not ready is no error to be found by the next kernel launch
    return Progress::kPending;
  }
  *error = cudaGetErrorString(result);
  return Progress::kError;
}

}  // namespace tpk::nccl
