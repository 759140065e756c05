// What a watchdog decides from: the operations that were started and have not been seen to end, and their deadlines.
// Pure bookkeeping with the clock and the device's answers passed in, so that it is tested without a GPU.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "common/status.h"

namespace tpk::nccl {

enum class Operation : int {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kBarrier,
  kReplay,
  kCreate,
  kRegister
};
const char* name_of(Operation operation);

// An operation in flight; times in nanoseconds of a steady clock. Without a token it is still being enqueued.
struct Entry {
  Operation operation = Operation::kAllReduce;
  std::uint64_t sequence = 0;
  std::int64_t started = 0;
  std::int64_t deadline = 0;
  std::shared_ptr<void> token;  // its end event
};

// Why a communicator broke. kTimeout: a deadline passed; kSystem: NCCL reported an error; kCuda: CUDA did.
struct Failure {
  Code code = Code::kOk;
  Operation operation = Operation::kAllReduce;
  std::uint64_t sequence = 0;
  std::string what;
};

enum class Progress { kPending, kDone, kError };

class Flight {
 public:
  // Asks the device about one entry; `error` receives the reason of a kError. Called without any lock held here.
  using Query = std::function<Progress(const Entry&, std::string* error)>;

  // Operations of the communicator end in the order in which they were added.
  void add(Entry entry);
  // The end event of operation `sequence` was recorded.
  void arm(std::uint64_t sequence, std::shared_ptr<void> token);
  // Operation `sequence` need not be watched (it was captured into a graph, or failed).
  void drop(std::uint64_t sequence);
  // Graph replays, in any order among operations; told apart by a number of their own.
  void add_replay(Entry entry);

  // Retires what has ended (at most `limit` entries), then looks at the deadlines.
  std::optional<Failure> review(std::int64_t now, const Query& query, int limit = 256);
  // As review, but for operations only and without judging: called to keep the number of events small.
  void retire(const Query& query, int limit);

  // Fills in the operation and sequence number of the oldest entry, if there is one.
  void name_oldest(Failure* failure) const;
  std::size_t size() const;

 private:
  std::optional<Failure> retire_lane(std::deque<Entry>& lane, const Query& query, int* budget);
  std::optional<Failure> overdue(const std::deque<Entry>& lane, std::int64_t now) const;

  mutable std::mutex mutex_;
  std::deque<Entry> operations_, replays_;
};

}  // namespace tpk::nccl
