// Making and leaving a group, and what all collectives share.
#include "comm/shm_communicator.h"

#include <pthread.h>
#include <unistd.h>

#include <cstring>

namespace tpk::shm {
namespace {

// Data that move from rank to rank below this rate, waits not counted, cross between distant caches. Measured on Zen 4
// for 128 KB: 0.8 GB/s between two core complexes, 3 to 7 within one; through memory, 2 to 3 in either case. Virtual
// machines move, so a rank that asked for staging through memory tries the caches again now and then.
constexpr double kFarBytesPerNs = 1.5;
constexpr int kFarAfter = 2;
constexpr int kFarMoves = 256;

std::atomic<std::uint64_t> fork_count{0};

}  // namespace

const void* this_thread() {
  static thread_local const char here = 0;
  return &here;
}

std::uint64_t forks() { return fork_count.load(std::memory_order_relaxed); }

Communicator::Communicator(int rank, int world_size, std::string name)
    : rank_(rank), world_size_(world_size), name_(std::move(name)), kernels_(reduce_kernels()) {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  fork_generation_ = forks();
}

Communicator::~Communicator() {
  struct Silent : BlockingHooks {
    void about_to_block() override {}
    bool interrupted() override { return false; }
  } hooks;
  close(hooks);
}

Status Communicator::create(const std::string& directory, std::size_t one_shot_bytes, std::size_t chunk_bytes) {
  if (Status status = segment_.create(directory, Layout::of(world_size_, one_shot_bytes, chunk_bytes)); !status.ok())
    return status;
  return join();
}

Status Communicator::attach(const Descriptor& descriptor) {
  if (Status status = segment_.attach(descriptor, world_size_); !status.ok()) return status;
  return join();
}

Status Communicator::join() {
  control_ = segment_.control();
  layout_ = segment_.layout();
  RankInfo& self = control_->ranks[rank_];
  self.pid = getpid();
  self.start_time = process_start_time(self.pid);
  allowed_cpus(self.cpus);
  return segment_.reserve(rank_);
}

void Communicator::activate() {
  segment_.close_file();
  peers_.open(control_->ranks, world_size_, rank_);
  policy_ = WaitPolicy::choose(control_->ranks, world_size_);
  one_shot_limit_ = world_size_ == 1 ? ~std::size_t{0} : layout_.one_shot_bytes;
  active_ = true;
  closed_.store(false);
}

void Communicator::close(BlockingHooks& hooks) {
  if (fork_generation_ != forks()) {  // the parent goes on using the group
    closed_.store(true);
    peers_.close();
    segment_.unmap();
    return;
  }
  const bool first = !closed_.exchange(true);
  if (first && busy_.load()) {
    AbortRecord& record = control_->abort;
    std::uint32_t none = 0;
    if (record.state.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) {
      record.cause = Cause::kClosed;
      record.reporter = rank_;
      record.culprits = std::uint64_t{1} << rank_;
      std::strncpy(record.text, "the communicator was closed during a call, by a signal handler or another thread",
                   sizeof(record.text) - 1);
      record.state.store(2, std::memory_order_seq_cst);
    }
    for (int r = 0; r < world_size_; ++r) wake_sleepers(progress(r));
  }
  // Called by a signal handler out of a call of this very thread: that call ends with an error once the handler is
  // done, and the destructor does the rest.
  if (busy_.load() && caller_.load() == this_thread()) return;
  hooks.about_to_block();  // before the lock: whoever holds it may be waiting for a call that needs the GIL
  const std::lock_guard<std::mutex> lock(closing_);
  if (!segment_.mapped()) return;
  while (busy_.load()) usleep(100);
  if (active_) {
    Progress& mine = progress(rank_);
    mine.left.store(1, std::memory_order_seq_cst);
    wake_sleepers(mine);
  }
  peers_.close();
  segment_.unmap();
}

void Communicator::reduce(void* dst, const void* const* src, std::size_t bytes, bool streaming) const {
  const auto& table = streaming ? kernels_.reduce_streaming : kernels_.reduce;
  table[static_cast<int>(call_.dtype)][static_cast<int>(call_.op)](dst, src, world_size_, bytes / size_of(call_.dtype));
}

void Communicator::copy(void* dst, const void* src, std::size_t bytes, bool streaming) const {
  if (streaming)
    kernels_.copy_streaming(dst, src, bytes);
  else
    std::memcpy(dst, src, bytes);
}

bool Communicator::stage_streaming() const {
  for (int r = 0; r < world_size_; ++r)
    if (control_->far[r].load(std::memory_order_relaxed) != 0) return true;
  return false;
}

// `bytes` went from one rank to another in the `busy_ns_` spent since the last call of this.
void Communicator::note_moved(std::size_t bytes) {
  const auto took = static_cast<double>(busy_ns_);
  busy_ns_ = 0;
  if (bytes < kFarMinBytes) return;
  std::atomic<std::uint8_t>& far = control_->far[rank_];
  if (far.load(std::memory_order_relaxed) != 0) {
    if (++streamed_moves_ >= kFarMoves) far.store(0, std::memory_order_relaxed);
    return;
  }
  slow_moves_ = static_cast<double>(bytes) < kFarBytesPerNs * took ? slow_moves_ + 1 : 0;
  if (slow_moves_ < kFarAfter) return;
  slow_moves_ = streamed_moves_ = 0;
  far.store(1, std::memory_order_relaxed);
}

// Chunked calls end here: the counters stand where every rank expects them at the next call.
bool Communicator::end_chunks(std::uint64_t steps) {
  step_ += steps;
  Progress& mine = progress(rank_);
  for (std::atomic<std::uint64_t>* counter : {&mine.staged, &mine.consumed, &mine.gathered})
    if (counter->load(std::memory_order_relaxed) < step_) counter->store(step_, std::memory_order_release);
  publish(mine.completed, sequence_, mine);
  return true;
}

}  // namespace tpk::shm
