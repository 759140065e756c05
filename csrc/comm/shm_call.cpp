// The life of a call: rendezvous, waiting, and what happens when a rank is missing, dead, different or gone.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm/shm_communicator.h"

namespace tpk::shm {
namespace {

constexpr std::int64_t kLookEvery = 50'000'000;  // ns between looks at peers, deadline and signals
constexpr std::int64_t kMismatchGrace =
    500'000'000;  // ns to wait for the calls of the remaining ranks, for the message

std::string list_of(std::uint64_t ranks) {
  std::string text = "[";
  for (int r = 0; r < kMaxRanks; ++r)
    if (ranks >> r & 1) text += (text.size() > 1 ? ", " : "") + std::to_string(r);
  return text + "]";
}

std::string ranks_text(std::uint64_t ranks) {
  return (__builtin_popcountll(ranks) == 1 ? "rank " : "ranks ") +
         (__builtin_popcountll(ranks) == 1 ? std::to_string(__builtin_ctzll(ranks)) : list_of(ranks));
}

std::string seconds(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3g s", value);
  return text;
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
    case Operation::kNone:
      break;
  }
  return "unknown";
}

std::string Communicator::describe(std::uint64_t what, std::uint64_t count, std::uint64_t sizes) const {
  const auto operation = static_cast<Operation>(what & 0xff);
  std::string text = name_of(operation);
  if (operation == Operation::kBarrier) return text;
  if (operation == Operation::kAllReduce || operation == Operation::kReduceScatter)
    text += std::string("(") + name_of(static_cast<ReduceOp>(what >> 16 & 0xff)) + ")";
  if (operation == Operation::kBroadcast) text += "(src=" + std::to_string(what >> 24 & 0xff) + ")";
  text += " of " + std::to_string(count) + " " + name_of(static_cast<DType>(what >> 8 & 0xff));
  if (sizes != 0) {
    char hash[32];
    std::snprintf(hash, sizeof(hash), "%06llx", static_cast<unsigned long long>(sizes & 0xffffff));
    text += std::string(" (per-rank sizes or layout #") + hash + ")";
  }
  return text;
}

std::string Communicator::call_text() const {
  return "call #" + std::to_string(sequence_) + ", " + describe(call_.what(), call_.count, call_.sizes);
}

bool Communicator::begin(const Call& call, double timeout, BlockingHooks& hooks) {
  call_ = call;
  chunked_ = false;
  timeout_ = timeout;
  waiting_since_ = 0;
  hooks_ = &hooks;
  if (closed())
    return fail(Code::kAborted, "group '" + name_ + "': " + name_of(call.operation) + " on a closed communicator", 0);
  if (fork_generation_ != forks())
    return fail(Code::kSystem,
                "group '" + name_ +
                    "': its communicator belongs to the parent process; a forked child cannot use it "
                    "and has to create a group of its own",
                0);
  if (!broken_.empty())
    return fail(Code::kAborted, "group '" + name_ + "' is broken since an earlier error: " + broken_, failure_.ranks);
  ++sequence_;
  if (control_->abort.state.load(std::memory_order_acquire) != 0) return adopt_abort();
  return true;
}

Status Communicator::end(bool ok) {
  hooks_ = nullptr;
  if (ok) return Status::Ok();
  return status_;
}

void Communicator::publish_header() {
  CallHeader& mine = header(rank_);
  mine.what = call_.what();
  mine.count = call_.count;
  mine.sizes = call_.sizes;
  progress(rank_).cpu.store(static_cast<std::uint32_t>(sched_getcpu()), std::memory_order_relaxed);
  publish(mine.sequence, sequence_, progress(rank_));
}

bool Communicator::wait_headers() {
  for (int r = 0; r < world_size_; ++r) {
    if (r == rank_) continue;
    const CallHeader& theirs = header(r);
    if (!wait(r, theirs.sequence, sequence_)) return false;
    if (theirs.what != call_.what() || theirs.count != call_.count || theirs.sizes != call_.sizes)
      return fail_mismatch();
  }
  return true;
}

bool Communicator::wait_all(std::atomic<std::uint64_t> Progress::* counter, std::uint64_t target) {
  for (int r = 0; r < world_size_; ++r)
    if (r != rank_ && !wait(r, progress(r).*counter, target)) return false;
  return true;
}

bool Communicator::wait_slow(int peer, const std::atomic<std::uint64_t>& word, std::uint64_t target) {
  const auto arrived = [&] { return word.load(std::memory_order_acquire) >= target; };
  // On a busy machine two ranks often share a processor: the other one cannot arrive while this one spins.
  const auto in_the_way = [&] {
    return progress(peer).cpu.load(std::memory_order_relaxed) == static_cast<std::uint32_t>(sched_getcpu());
  };
  if (policy_.hold > 0 && !in_the_way()) {
    // The usual case between ranks in step; not even the clock is read.
    for (int i = 0; i < 128; ++i) {
      cpu_pause();
      if (arrived()) return true;
    }
  }
  std::int64_t now = monotonic_ns();
  const std::int64_t since = now;
  if (waiting_since_ == 0) {
    waiting_since_ = now;
    next_look_ = now + std::min(kLookEvery, static_cast<std::int64_t>(timeout_ * 1e9));
  }
  for (;;) {
    const std::int64_t waited = now - since;
    const bool spin = waited < policy_.spin && !in_the_way();
    if (waited >= policy_.hold || !spin) hooks_->about_to_block();
    bool look = false;
    if (spin) {
      for (int i = 0; i < 32; ++i) {
        cpu_pause();
        if (arrived()) return true;
      }
    } else if (waited < policy_.yield) {
      sched_yield();
    } else {
      look = sleep_at(progress(peer), word, target, std::max<std::int64_t>(next_look_ - now, 10'000));
    }
    if (arrived()) return true;
    if (control_->abort.state.load(std::memory_order_acquire) != 0) return adopt_abort();
    now = monotonic_ns();
    if (look || now >= next_look_ || progress(peer).left.load(std::memory_order_acquire) != 0) {
      if (!still_fine(peer, word, target, now)) return false;
      const auto deadline = waiting_since_ + static_cast<std::int64_t>(timeout_ * 1e9);
      next_look_ = std::min(now + kLookEvery, std::max(deadline, now));
    }
  }
}

// A rank that has ended or left matters only if this call still needs something from it.
bool Communicator::unfinished(int peer) const {
  if (header(peer).sequence.load(std::memory_order_acquire) < sequence_) return true;
  return chunked_ && progress(peer).completed.load(std::memory_order_acquire) < sequence_;
}

bool Communicator::still_fine(int peer, const std::atomic<std::uint64_t>& word, std::uint64_t target,
                              std::int64_t now) {
  if (hooks_->interrupted()) {
    abort(Cause::kInterrupted, "rank " + std::to_string(rank_) + " was interrupted in " + call_text(),
          std::uint64_t{1} << rank_);
    return false;
  }
  const std::uint64_t ended = peers_.dead();
  std::uint64_t left = 0, dead = 0, absent = 0;
  for (int r = 0; r < world_size_; ++r) {
    if (r == rank_) continue;
    const std::uint64_t bit = std::uint64_t{1} << r;
    const bool closed = progress(r).left.load(std::memory_order_acquire) != 0;
    if (header(r).sequence.load(std::memory_order_acquire) < sequence_) absent |= bit;
    if ((closed || (ended & bit) != 0) && unfinished(r)) (closed ? left : dead) |= bit;
  }
  if (left != 0)
    return abort(Cause::kLeft,
                 ranks_text(left) + " left the group (closed its communicator) while others waited in " + call_text(),
                 left);
  if (dead != 0) {
    std::string pids;
    for (int r = 0; r < world_size_; ++r)
      if (dead >> r & 1)
        pids += (pids.empty() ? "rank " : ", rank ") + std::to_string(r) + " (pid " +
                std::to_string(control_->ranks[r].pid) + ")";
    return abort(Cause::kPeerDied, pids + " ended while others waited for it in " + call_text(), dead);
  }
  const double waited = static_cast<double>(now - waiting_since_) * 1e-9;
  if (waited < timeout_ || word.load(std::memory_order_acquire) >= target) return true;
  std::string text = "rank " + std::to_string(rank_) + " waited " + seconds(waited) + " in " + call_text() + ", for ";
  if (absent != 0) {
    text += ranks_text(absent) + ", which did not call it";
  } else {
    absent = std::uint64_t{1} << peer;
    text += ranks_text(absent) + ", which stopped in the middle of it";
  }
  return abort(Cause::kTimeout, text, absent);
}

bool Communicator::fail(Code code, std::string message, std::uint64_t ranks) {
  status_ = Status::Error(code, std::move(message));
  failure_.operation = name_of(call_.operation);
  failure_.sequence = sequence_;
  failure_.ranks = ranks;
  return false;
}

bool Communicator::abort(Cause cause, const std::string& text, std::uint64_t culprits) {
  AbortRecord& record = control_->abort;
  std::uint32_t none = 0;
  if (record.state.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) {
    record.cause = cause;
    record.reporter = rank_;
    record.sequence = sequence_;
    record.culprits = culprits;
    const std::size_t n = std::min(text.size(), sizeof(record.text) - 1);
    std::memcpy(record.text, text.data(), n);
    record.text[n] = 0;
    record.state.store(2, std::memory_order_seq_cst);
    for (int r = 0; r < world_size_; ++r) wake_sleepers(progress(r));
  }
  return adopt_abort();
}

bool Communicator::adopt_abort() {
  const AbortRecord& record = control_->abort;
  // The writer may have been killed half way: then there is no story to tell.
  for (const std::int64_t start = monotonic_ns();
       record.state.load(std::memory_order_acquire) != 2 && monotonic_ns() - start < 100'000'000;)
    sched_yield();
  if (record.state.load(std::memory_order_acquire) != 2) {
    broken_ = "a rank ended while it reported an error";
    return fail(Code::kAborted, "group '" + name_ + "': " + broken_, 0);
  }
  const bool mine = record.reporter == rank_;
  const bool to_blame = (record.culprits >> rank_ & 1) != 0;
  Code code = Code::kAborted;
  switch (record.cause) {
    case Cause::kTimeout:
      if (mine || !to_blame) code = Code::kTimeout;
      break;
    case Cause::kPeerDied:
      code = Code::kPeerDied;
      break;
    case Cause::kMismatch:
      code = Code::kMismatch;
      break;
    case Cause::kInterrupted:
      if (mine) code = Code::kInterrupted;
      break;
    case Cause::kLeft:
    case Cause::kClosed:
    case Cause::kNone:
      break;
  }
  broken_ = record.text;
  std::string message = "group '" + name_ + "': " + record.text;
  if (!mine) message += " (reported by rank " + std::to_string(record.reporter) + ")";
  return fail(code, std::move(message), record.culprits);
}

bool Communicator::fail_mismatch() {
  hooks_->about_to_block();
  const std::int64_t start = monotonic_ns();
  std::string text = "the ranks called different operations as their call #" + std::to_string(sequence_) + ": ";
  std::uint64_t differs[kMaxRanks] = {};  // per rank: the ranks whose call differs from its call
  bool known[kMaxRanks] = {};
  for (int r = 0; r < world_size_; ++r) {
    while (header(r).sequence.load(std::memory_order_acquire) < sequence_ &&
           control_->abort.state.load(std::memory_order_acquire) == 0 && monotonic_ns() - start < kMismatchGrace)
      sched_yield();
    known[r] = header(r).sequence.load(std::memory_order_acquire) >= sequence_;
    text += (r == 0 ? "rank " : "; rank ") + std::to_string(r) + ": " +
            (known[r] ? describe(header(r).what, header(r).count, header(r).sizes) : "no call yet");
  }
  int best = -1;
  for (int r = 0; r < world_size_; ++r) {
    if (!known[r]) continue;
    for (int other = 0; other < world_size_; ++other)
      if (known[other] && (header(r).what != header(other).what || header(r).count != header(other).count ||
                           header(r).sizes != header(other).sizes))
        differs[r] |= std::uint64_t{1} << other;
    if (best < 0 || __builtin_popcountll(differs[r]) < __builtin_popcountll(differs[best])) best = r;
  }
  // The odd ones out are to blame; where no call has a majority, everyone is.
  const int agree = world_size_ - __builtin_popcountll(differs[best]);
  const std::uint64_t all = world_size_ == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << world_size_) - 1;
  return abort(Cause::kMismatch, text, 2 * agree > world_size_ ? differs[best] : all);
}

}  // namespace tpk::shm
