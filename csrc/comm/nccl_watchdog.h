// The thread that sees to it that a communicator never hangs: reviews what is in flight a few times a second and, when
// something is late or broken, ends the communicator. Knows neither Python nor CUDA.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "comm/nccl_flight.h"

namespace tpk::nccl {

std::int64_t steady_now();  // nanoseconds

class Watchdog {
 public:
  struct Hooks {
    std::function<void()> prepare;               // in the thread, before anything else
    Flight::Query query;                         // see Flight
    std::function<std::string()> library_error;  // what NCCL reports about the communicator; empty: nothing
    std::function<void(const Failure&)> abort;   // stops what still runs on the device; called once, may take seconds
  };

  explicit Watchdog(Hooks hooks);
  ~Watchdog();  // as stop()
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  Flight& flight() { return flight_; }
  void start();
  void stop();  // waits for the thread; it no longer touches anything afterwards
  // After adding to the flight: the thread sleeps for as long as nothing has been in flight for a while.
  void note_activity() {
    if (idle_.load()) wake();
  }

  // Breaks the communicator for a reason seen elsewhere; the thread aborts it. The first failure stays.
  void fail(const Failure& failure);
  bool failed() const { return failed_.load(); }
  std::optional<Failure> failure() const;

 private:
  void run();
  void wake();

  const Hooks hooks_;
  Flight flight_;
  std::thread thread_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
  bool woken_ = false;
  std::optional<Failure> failure_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> idle_{false};
};

}  // namespace tpk::nccl
