// The collectives: one-shot for short messages, a ring of chunks for long ones.
#include <algorithm>
#include <cstring>

#include "comm/shm_communicator.h"

namespace tpk::shm {
namespace {

// Above this many bytes the result will not stay in the cache anyway: streaming stores save reading it first.
constexpr std::size_t kStreamBytes = std::size_t{8} << 20;
// Below it, a call keeps the GIL until it really has to wait.
constexpr std::size_t kBriefBytes = std::size_t{64} << 10;

// Adds the time of its scope to a total.
class Stopwatch {
 public:
  explicit Stopwatch(std::int64_t& total) : total_(total), started_(monotonic_ns()) {}
  ~Stopwatch() { total_ += monotonic_ns() - started_; }

 private:
  std::int64_t& total_;
  const std::int64_t started_;
};

std::uint64_t hash_of(std::size_t rows, const std::vector<std::size_t>& counts) {
  const bool even = std::all_of(counts.begin(), counts.end(), [&](std::size_t n) { return n == counts[0]; });
  if (even && rows == 1) return 0;
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](std::uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (value >> (8 * byte) & 0xff)) * 0x100000001b3;
  };
  add(rows);
  for (const std::size_t n : counts) add(n);
  return hash | 1;
}

std::size_t sum_of(const std::vector<std::size_t>& counts) {
  std::size_t sum = 0;
  for (const std::size_t n : counts) sum += n;
  return sum;
}

bool overlap(const void* a, std::size_t a_bytes, const void* b, std::size_t b_bytes) {
  const auto x = reinterpret_cast<std::uintptr_t>(a), y = reinterpret_cast<std::uintptr_t>(b);
  return x < y + b_bytes && y < x + a_bytes;
}

}  // namespace

// Refuses a second thread: the order of calls would be undefined.
class Communicator::Running {
 public:
  explicit Running(Communicator& owner) : owner_(owner), first_(!owner.busy_.exchange(true)) {
    if (first_) owner_.caller_.store(this_thread(), std::memory_order_relaxed);
  }
  ~Running() {
    if (!first_) return;
    owner_.caller_.store(nullptr, std::memory_order_relaxed);
    owner_.busy_.store(false, std::memory_order_release);
  }
  explicit operator bool() const { return first_; }
  Status refuse() const {
    return Status::Error(Code::kInvalidArgument,
                         "group '" + owner_.name_ + "': two threads called its communicator at the same time");
  }

 private:
  Communicator& owner_;
  const bool first_;
};

Status Communicator::all_reduce(const void* in, void* out, std::size_t count, DType dtype, ReduceOp op, double timeout,
                                BlockingHooks& hooks) {
  const std::size_t bytes = count * size_of(dtype);
  if (count > 0 && (in == nullptr || out == nullptr))
    return Status::Error(Code::kInvalidArgument, "all_reduce: a tensor without memory (fake or meta) was passed");
  if (in != out && overlap(in, bytes, out, bytes))
    return Status::Error(Code::kInvalidArgument, "all_reduce: out overlaps x; pass out=x or separate memory");
  Running running(*this);
  if (!running) return running.refuse();
  if (!begin({Operation::kAllReduce, dtype, op, 0, count, 0}, timeout, hooks)) return end(false);
  if (bytes > kBriefBytes) hooks.about_to_block();
  if (bytes > one_shot_limit_)
    return end(all_reduce_chunked(static_cast<const char*>(in), static_cast<char*>(out), bytes));
  const bool noted = world_size_ > 1 && bytes >= kFarMinBytes;
  const std::int64_t started = noted ? monotonic_ns() : 0;
  if (world_size_ > 1 && bytes > 0)
    copy(segment_.at(layout_.one_shot(rank_, sequence_)), in, bytes, noted && stage_streaming());
  const std::int64_t staged = noted ? monotonic_ns() : 0;
  if (!rendezvous()) return end(false);
  const std::int64_t met = noted ? monotonic_ns() : 0;
  const void* src[kMaxRanks];
  for (int r = 0; r < world_size_; ++r) src[r] = r == rank_ ? in : segment_.at(layout_.one_shot(r, sequence_));
  if (bytes > 0) reduce(out, src, bytes, false);
  if (noted) {
    busy_ns_ = staged - started + monotonic_ns() - met;
    note_moved(bytes * (world_size_ - 1));
  }
  return end(true);
}

bool Communicator::all_reduce_chunked(const char* in, char* out, std::size_t bytes) {
  chunked_ = true;
  busy_ns_ = 0;
  const std::uint64_t base = step_;
  const std::size_t steps = (bytes + layout_.chunk_bytes - 1) / layout_.chunk_bytes;
  // Chunks of equal length, cut into one part per rank; the part of rank r is reduced by rank r.
  const std::size_t part = round_up(((bytes + steps - 1) / steps + world_size_ - 1) / world_size_, 64);
  const std::size_t chunk = part * world_size_;
  const bool streaming = bytes >= kStreamBytes;
  bool past_cache = false;
  Progress& mine = progress(rank_);

  const auto begin_of = [&](std::size_t step, int r) { return std::min(step * chunk + r * part, bytes); };
  const auto length_of = [&](std::size_t step, int r) { return std::min(part, bytes - begin_of(step, r)); };
  const auto stage = [&](std::size_t step) {
    const std::uint64_t s = base + step;
    // The slot was last used kRing chunks ago: everyone must have read it.
    if (s >= kRing && !wait_all(&Progress::consumed, s - kRing + 1)) return false;
    char* slot = segment_.at(layout_.staging(rank_, s));
    past_cache = stage_streaming();
    const Stopwatch watch(busy_ns_);
    for (int r = 0; r < world_size_; ++r)
      if (r != rank_) copy(slot + r * part, in + begin_of(step, r), length_of(step, r), past_cache);
    publish(mine.staged, s + 1, mine);
    return true;
  };
  const auto reduce_own = [&](std::size_t step) {
    const std::uint64_t s = base + step;
    if (!wait_all(&Progress::staged, s + 1)) return false;
    if (s >= kRing && !wait_all(&Progress::gathered, s - kRing + 1)) return false;
    const std::size_t at = begin_of(step, rank_), n = length_of(step, rank_);
    const void* src[kMaxRanks];
    for (int r = 0; r < world_size_; ++r)
      src[r] = r == rank_ ? in + at : segment_.at(layout_.staging(r, s)) + rank_ * part;
    char* slot = segment_.at(layout_.result(rank_, s));
    {
      const Stopwatch watch(busy_ns_);
      reduce(slot, src, n, past_cache);
    }
    publish(mine.consumed, s + 1, mine);
    copy(out + at, slot, n, streaming);
    return true;
  };
  const auto gather = [&](std::size_t step) {
    const std::uint64_t s = base + step;
    if (!wait_all(&Progress::consumed, s + 1)) return false;
    const Stopwatch watch(busy_ns_);
    for (int r = 0; r < world_size_; ++r)
      if (r != rank_) copy(out + begin_of(step, r), segment_.at(layout_.result(r, s)), length_of(step, r), streaming);
    publish(mine.gathered, s + 1, mine);
    return true;
  };

  // Chunk k+1 is staged and chunk k-1 gathered around the reduction of chunk k: a rank is rarely waited for.
  if (!stage(0) || !rendezvous()) return false;
  for (std::size_t step = 0; step < steps; ++step) {
    if (step + 1 < steps && !stage(step + 1)) return false;
    if (!reduce_own(step)) return false;
    if (step > 0 && !gather(step - 1)) return false;
    note_moved(part * (world_size_ - 1));
  }
  return gather(steps - 1) && end_chunks(steps);
}

Status Communicator::reduce_scatter(const void* in, void* out, const std::vector<std::size_t>& counts, DType dtype,
                                    ReduceOp op, double timeout, BlockingHooks& hooks) {
  const std::size_t element = size_of(dtype), total = sum_of(counts);
  if ((total > 0 && in == nullptr) || (counts[rank_] > 0 && out == nullptr))
    return Status::Error(Code::kInvalidArgument, "reduce_scatter: a tensor without memory (fake or meta) was passed");
  Running running(*this);
  if (!running) return running.refuse();
  if (!begin({Operation::kReduceScatter, dtype, op, 0, total, hash_of(1, counts)}, timeout, hooks)) return end(false);
  const std::size_t bytes = total * element;
  if (bytes > kBriefBytes) hooks.about_to_block();
  if (bytes > one_shot_limit_)
    return end(reduce_scatter_chunked(static_cast<const char*>(in), static_cast<char*>(out), counts));
  std::size_t at = 0;
  for (int r = 0; r < rank_; ++r) at += counts[r] * element;
  if (world_size_ > 1 && bytes > 0) std::memcpy(segment_.at(layout_.one_shot(rank_, sequence_)), in, bytes);
  if (!rendezvous()) return end(false);
  const void* src[kMaxRanks];
  for (int r = 0; r < world_size_; ++r)
    src[r] = (r == rank_ ? static_cast<const char*>(in) : segment_.at(layout_.one_shot(r, sequence_))) + at;
  if (counts[rank_] > 0) reduce(out, src, counts[rank_] * element, false);
  return end(true);
}

bool Communicator::reduce_scatter_chunked(const char* in, char* out, const std::vector<std::size_t>& counts) {
  chunked_ = true;
  busy_ns_ = 0;
  const std::size_t element = size_of(call_.dtype), part = layout_.part_bytes;
  std::size_t begin[kMaxRanks], length[kMaxRanks], longest = 0, total = 0;
  for (int r = 0; r < world_size_; ++r) {
    begin[r] = total;
    length[r] = counts[r] * element;
    total += length[r];
    longest = std::max(longest, length[r]);
  }
  const std::uint64_t base = step_;
  const std::size_t steps = (longest + part - 1) / part;
  const bool streaming = length[rank_] >= kStreamBytes;
  Progress& mine = progress(rank_);
  const auto length_of = [&](std::size_t step, int r) {
    return step * part >= length[r] ? 0 : std::min(part, length[r] - step * part);
  };
  const auto stage = [&](std::size_t step) {
    const std::uint64_t s = base + step;
    if (s >= kRing && !wait_all(&Progress::consumed, s - kRing + 1)) return false;
    char* slot = segment_.at(layout_.staging(rank_, s));
    const bool past_cache = stage_streaming();
    const Stopwatch watch(busy_ns_);
    for (int r = 0; r < world_size_; ++r)
      if (const std::size_t n = length_of(step, r); r != rank_ && n > 0)
        copy(slot + r * part, in + begin[r] + step * part, n, past_cache);
    publish(mine.staged, s + 1, mine);
    return true;
  };
  if (!stage(0) || !rendezvous()) return false;
  for (std::size_t step = 0; step < steps; ++step) {
    const std::uint64_t s = base + step;
    if (step + 1 < steps && !stage(step + 1)) return false;
    if (!wait_all(&Progress::staged, s + 1)) return false;
    if (const std::size_t n = length_of(step, rank_); n > 0) {
      const void* src[kMaxRanks];
      for (int r = 0; r < world_size_; ++r)
        src[r] = r == rank_ ? in + begin[rank_] + step * part : segment_.at(layout_.staging(r, s)) + rank_ * part;
      {
        const Stopwatch watch(busy_ns_);
        reduce(out + step * part, src, n, streaming);
      }
      note_moved(n * (world_size_ - 1));
    }
    publish(mine.consumed, s + 1, mine);
  }
  return end_chunks(steps);
}

Status Communicator::all_gather(const void* in, void* out, std::size_t rows, const std::vector<std::size_t>& counts,
                                DType dtype, double timeout, BlockingHooks& hooks) {
  const std::size_t element = size_of(dtype), total = sum_of(counts);
  if ((counts[rank_] > 0 && in == nullptr) || (total > 0 && out == nullptr))
    return Status::Error(Code::kInvalidArgument, "all_gather: a tensor without memory (fake or meta) was passed");
  Running running(*this);
  if (!running) return running.refuse();
  if (!begin({Operation::kAllGather, dtype, ReduceOp::kSum, 0, total, hash_of(rows, counts)}, timeout, hooks))
    return end(false);
  rows = std::max<std::size_t>(rows, 1);
  gather_.out = static_cast<char*>(out);
  gather_.rows = rows;
  gather_.row_stride = total * element / rows;
  std::size_t column = 0, longest = 0;
  for (int r = 0; r < world_size_; ++r) {
    gather_.row_bytes[r] = counts[r] * element / rows;
    gather_.column[r] = column;
    column += gather_.row_bytes[r];
    longest = std::max(longest, counts[r] * element);
  }
  const std::size_t own = counts[rank_] * element;
  if (total * element > kBriefBytes) hooks.about_to_block();
  if (longest > one_shot_limit_) return end(all_gather_chunked(static_cast<const char*>(in), counts));
  if (world_size_ > 1 && own > 0) std::memcpy(segment_.at(layout_.one_shot(rank_, sequence_)), in, own);
  if (!rendezvous()) return end(false);
  for (int r = 0; r < world_size_; ++r)
    place_gathered(r, 0, counts[r] * element,
                   r == rank_ ? static_cast<const char*>(in) : segment_.at(layout_.one_shot(r, sequence_)));
  return end(true);
}

// Copies bytes [begin, begin + bytes) of rank r's data to their rows in the output.
void Communicator::place_gathered(int r, std::size_t begin, std::size_t bytes, const char* src) const {
  if (bytes == 0) return;
  const std::size_t width = gather_.row_bytes[r];
  if (gather_.rows == 1) {
    std::memcpy(gather_.out + gather_.column[r] + begin, src, bytes);
    return;
  }
  std::size_t row = begin / width, column = begin % width;
  while (bytes > 0) {
    const std::size_t n = std::min(bytes, width - column);
    std::memcpy(gather_.out + row * gather_.row_stride + gather_.column[r] + column, src, n);
    src += n;
    bytes -= n;
    column = 0;
    ++row;
  }
}

bool Communicator::all_gather_chunked(const char* in, const std::vector<std::size_t>& counts) {
  chunked_ = true;
  busy_ns_ = 0;
  const std::size_t element = size_of(call_.dtype), chunk = layout_.chunk_bytes;
  const std::size_t longest = *std::max_element(counts.begin(), counts.end()) * element;
  const std::uint64_t base = step_;
  const std::size_t steps = (longest + chunk - 1) / chunk;
  Progress& mine = progress(rank_);
  const auto length_of = [&](std::size_t step, int r) {
    const std::size_t length = counts[r] * element;
    return step * chunk >= length ? 0 : std::min(chunk, length - step * chunk);
  };
  const auto stage = [&](std::size_t step) {
    const std::uint64_t s = base + step;
    if (s >= kRing && !wait_all(&Progress::consumed, s - kRing + 1)) return false;
    const Stopwatch watch(busy_ns_);
    if (const std::size_t n = length_of(step, rank_); n > 0)
      copy(segment_.at(layout_.staging(rank_, s)), in + step * chunk, n, stage_streaming());
    publish(mine.staged, s + 1, mine);
    return true;
  };
  if (!stage(0) || !rendezvous()) return false;
  for (std::size_t step = 0; step < steps; ++step) {
    const std::uint64_t s = base + step;
    if (step + 1 < steps && !stage(step + 1)) return false;
    place_gathered(rank_, step * chunk, length_of(step, rank_), in + step * chunk);
    for (int r = 0; r < world_size_; ++r) {
      if (r == rank_) continue;
      if (!wait(r, progress(r).staged, s + 1)) return false;
      const Stopwatch watch(busy_ns_);
      place_gathered(r, step * chunk, length_of(step, r), segment_.at(layout_.staging(r, s)));
    }
    note_moved(chunk * (world_size_ - 1));
    publish(mine.consumed, s + 1, mine);
  }
  return end_chunks(steps);
}

Status Communicator::broadcast(void* data, std::size_t count, DType dtype, int root, double timeout,
                               BlockingHooks& hooks) {
  const std::size_t bytes = count * size_of(dtype);
  if (count > 0 && data == nullptr)
    return Status::Error(Code::kInvalidArgument, "broadcast: a tensor without memory (fake or meta) was passed");
  Running running(*this);
  if (!running) return running.refuse();
  if (!begin({Operation::kBroadcast, dtype, ReduceOp::kSum, root, count, 0}, timeout, hooks)) return end(false);
  if (bytes > kBriefBytes) hooks.about_to_block();
  if (bytes > one_shot_limit_) return end(broadcast_chunked(static_cast<char*>(data), bytes));
  char* slot = segment_.at(layout_.one_shot(root, sequence_));
  if (rank_ == root && world_size_ > 1 && bytes > 0) std::memcpy(slot, data, bytes);
  if (!rendezvous()) return end(false);
  if (rank_ != root && bytes > 0) std::memcpy(data, slot, bytes);
  return end(true);
}

bool Communicator::broadcast_chunked(char* data, std::size_t bytes) {
  chunked_ = true;
  busy_ns_ = 0;
  const std::size_t chunk = layout_.chunk_bytes;
  const std::uint64_t base = step_;
  const std::size_t steps = (bytes + chunk - 1) / chunk;
  const int root = call_.root;
  Progress& mine = progress(rank_);
  if (!rendezvous()) return false;
  for (std::size_t step = 0; step < steps; ++step) {
    const std::uint64_t s = base + step;
    const std::size_t n = std::min(chunk, bytes - step * chunk);
    char* slot = segment_.at(layout_.staging(root, s));
    if (rank_ == root) {
      if (s >= kRing && !wait_all(&Progress::consumed, s - kRing + 1)) return false;
      {
        const Stopwatch watch(busy_ns_);
        copy(slot, data + step * chunk, n, stage_streaming());
      }
      note_moved(n);
      publish(mine.staged, s + 1, mine);
    } else {
      if (!wait(root, progress(root).staged, s + 1)) return false;
      {
        const Stopwatch watch(busy_ns_);
        std::memcpy(data + step * chunk, slot, n);
      }
      note_moved(n);
      publish(mine.consumed, s + 1, mine);
    }
  }
  return end_chunks(steps);
}

Status Communicator::barrier(double timeout, BlockingHooks& hooks) {
  Running running(*this);
  if (!running) return running.refuse();
  if (!begin({Operation::kBarrier, DType::kFloat32, ReduceOp::kSum, 0, 0, 0}, timeout, hooks)) return end(false);
  return end(rendezvous());
}

}  // namespace tpk::shm
