#include "comm/nccl_watchdog.h"

#include <chrono>
#include <utility>

namespace tpk::nccl {
namespace {

// Often enough for deadlines of seconds; asking the device more often would hold up threads that launch kernels.
constexpr std::chrono::milliseconds kPeriod{50};
// Reviews without anything in flight before the thread sleeps until woken.
constexpr int kQuietReviews = 20;

}  // namespace

std::int64_t steady_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Watchdog::Watchdog(Hooks hooks) : hooks_(std::move(hooks)) {}

Watchdog::~Watchdog() { stop(); }

void Watchdog::start() {
  thread_ = std::thread([this] { run(); });
}

void Watchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Watchdog::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  wake_.notify_all();
}

void Watchdog::fail(const Failure& failure) {
  {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = failure;
    failed_.store(true);
    woken_ = true;
  }
  wake_.notify_all();
}

std::optional<Failure> Watchdog::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void Watchdog::run() {
  hooks_.prepare();
  for (int quiet = 0;;) {
    {
      std::unique_lock lock(mutex_);
      const auto due = [this] { return stopping_ || woken_; };
      if (quiet < kQuietReviews)
        wake_.wait_for(lock, kPeriod, due);
      else
        wake_.wait(lock, due);
      if (stopping_ && !failure_) return;
      woken_ = false;
    }
    if (!failed()) {
      if (auto failure = flight_.review(steady_now(), hooks_.query)) {
        fail(*failure);
      } else if (flight_.size() > 0) {
        if (std::string error = hooks_.library_error(); !error.empty()) {
          Failure broken{Code::kSystem, Operation::kAllReduce, 0, std::move(error)};
          flight_.name_oldest(&broken);
          fail(broken);
        }
      }
    }
    if (failed()) {
      hooks_.abort(*failure());
      return;
    }
    quiet = flight_.size() > 0 ? 0 : quiet + 1;
    idle_.store(quiet >= kQuietReviews);
    // Work may have been added just before others could see that it must wake this thread.
    if (idle_.load() && flight_.size() > 0) {
      idle_.store(false);
      quiet = 0;
    }
  }
}

}  // namespace tpk::nccl
