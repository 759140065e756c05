#include "comm/nccl_flight.h"

#include <algorithm>
#include <cstdio>

namespace tpk::nccl {
namespace {

std::string seconds(std::int64_t nanoseconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", static_cast<double>(nanoseconds) * 1e-9);
  return text;
}

std::string describe(const Entry& entry) {
  const char* counted = entry.operation == Operation::kReplay ? " (number " : " (call ";
  return name_of(entry.operation) + (counted + std::to_string(entry.sequence)) + ")";
}

}  // namespace

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kAllReduce:
      return "all_reduce";
    case Operation::kReduceScatter:
      return "reduce_scatter";
    case Operation::kAllGather:
      return "all_gather";
    case Operation::kBroadcast:
      return "broadcast";
    case Operation::kBarrier:
      return "barrier";
    case Operation::kReplay:
      return "graph replay";
    case Operation::kCreate:
      return "create";
    case Operation::kRegister:
      return "register";
  }
  return "unknown";
}

void Flight::add(Entry entry) {
  const std::lock_guard lock(mutex_);
  operations_.push_back(std::move(entry));
}

void Flight::add_replay(Entry entry) {
  const std::lock_guard lock(mutex_);
  replays_.push_back(std::move(entry));
}

void Flight::arm(std::uint64_t sequence, std::shared_ptr<void> token) {
  const std::lock_guard lock(mutex_);
  for (auto entry = operations_.rbegin(); entry != operations_.rend(); ++entry) {
    if (entry->sequence != sequence) continue;
    entry->token = std::move(token);
    return;
  }
}

void Flight::drop(std::uint64_t sequence) {
  const std::lock_guard lock(mutex_);
  const auto is_it = [sequence](const Entry& entry) { return entry.sequence == sequence; };
  operations_.erase(std::remove_if(operations_.begin(), operations_.end(), is_it), operations_.end());
}

std::optional<Failure> Flight::retire_lane(std::deque<Entry>& lane, const Query& query, int* budget) {
  for (; *budget > 0; --*budget) {
    Entry oldest;
    {
      const std::lock_guard lock(mutex_);
      if (lane.empty() || lane.front().token == nullptr) return std::nullopt;
      oldest = lane.front();
    }
    std::string error;
    const Progress progress = query(oldest, &error);
    if (progress == Progress::kPending) return std::nullopt;
    if (progress == Progress::kError)
      return Failure{Code::kCuda, oldest.operation, oldest.sequence, describe(oldest) + " failed: " + error};
    const std::lock_guard lock(mutex_);
    // Another thread may have retired it meanwhile.
    if (!lane.empty() && lane.front().sequence == oldest.sequence) lane.pop_front();
  }
  return std::nullopt;
}

std::optional<Failure> Flight::overdue(const std::deque<Entry>& lane, std::int64_t now) const {
  for (const Entry& entry : lane) {
    if (entry.deadline > now) continue;
    // A call with a short deadline may be the first to be late, while an earlier one holds it up.
    const Entry& oldest = lane.front();
    std::string what = describe(oldest) + (oldest.token == nullptr ? " could not be enqueued" : " has not ended") +
                       " after " + seconds(now - oldest.started);
    if (&entry != &oldest) what += ", and " + describe(entry) + " behind it is past its deadline";
    return Failure{Code::kTimeout, oldest.operation, oldest.sequence, what};
  }
  return std::nullopt;
}

std::optional<Failure> Flight::review(std::int64_t now, const Query& query, int limit) {
  int budget = limit;
  if (auto failure = retire_lane(operations_, query, &budget)) return failure;
  // A lane that used up the budget is moving, and its front was not asked: not judged this time.
  const bool operations_seen = budget > 0;
  budget = limit;
  if (auto failure = retire_lane(replays_, query, &budget)) return failure;
  const std::lock_guard lock(mutex_);
  if (operations_seen)
    if (auto failure = overdue(operations_, now)) return failure;
  return budget > 0 ? overdue(replays_, now) : std::nullopt;
}

void Flight::retire(const Query& query, int limit) { retire_lane(operations_, query, &limit); }

void Flight::name_oldest(Failure* failure) const {
  const std::lock_guard lock(mutex_);
  const std::deque<Entry>& lane = operations_.empty() ? replays_ : operations_;
  if (lane.empty()) return;
  failure->operation = lane.front().operation;
  failure->sequence = lane.front().sequence;
}

std::size_t Flight::size() const {
  const std::lock_guard lock(mutex_);
  return operations_.size() + replays_.size();
}

}  // namespace tpk::nccl
