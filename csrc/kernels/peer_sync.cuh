// How ranks wait for each other inside a kernel.
//
// Memory order. A block writes (its own memory or its peers'), __syncthreads makes those writes happen before the
// st.release.sys by which one thread for each peer raises the block's flag there, and release is cumulative. The peer's
// ld.acquire.sys that sees the flag, followed by __syncthreads, puts all of its block's later accesses behind them. So
// data moves by ordinary accesses; none is ld.global.nc, which may return what a buffer held before.
//
// Why no barrier follows the last read. Call n stages its input in half n % 2 of the own memory. Rank r writes that
// half again in call n + 2. Its kernel n + 2 starts when its kernel n + 1 has ended (stream order), and that one ended
// only after each of its blocks had seen a flag of call n + 1 from every peer. A peer raises such a flag in its kernel
// n + 1, which started when its kernel n had ended, with all reads of call n by all of its blocks. This holds whatever
// the grids, sizes and algorithms of the three calls are, because a kernel boundary stands for all blocks of a rank;
// within a call all ranks have the same grid, and a block reads only what the blocks of the same index have written.
// What a call needs to keep this true: every block of every call waits for at least one flag of that call from every
// peer. Data that a call reads elsewhere than in the halves (registered inputs) has no second copy; such calls end with
// one more exchange unless their last one already follows the last read. Writes to a peer's memory follow the first
// exchange of the call: then all ranks are in this call, so none of them still reads what it overwrites there in an
// earlier one, and the peer's stream has come to this call too.
// The kernel that multiplies as well (tp_kernels/ops/kernels/peer_linear_kernel.py) keeps this as a whole, not block by
// block: it ends only with all its results, and each of those needed a flag of the call that the owner of its rows had
// seen from every peer. It writes to the peers' halves without an exchange: to the one that call n - 2 used, which all
// ranks have ended when call n - 1 has ended anywhere.
//
// Blocks of a grid start in order of index and block b waits for blocks b only, so ranks make progress even if not all
// blocks fit at once; grids are nevertheless capped by max_blocks.
//
// Lamport calls count apart and use three buffers in turn. Call k fills buffer k % 3 of the peers, and empties the own
// buffer of call k - 1. A peer fills that one again in call k + 2, after its call k + 1 has received this rank's data
// of call k + 1, which is sent by a kernel that started after the one that emptied. Emptying the buffer of call k - 2
// instead (the one that k + 1 fills) would race with peers that are already in k + 1; so would two buffers.
//
// Failure. A wait that exceeds its deadline sets Flags::failed on the own device and fills the error record on the
// host. The block then returns; others of the kernel do the same when their own waits see it. Later kernels return at
// once and send nothing: the counts in BlockState are then not the same in all blocks, and data sent by them could be
// taken for another call's. The workspace stays unusable until it is made anew.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/peer_layout.h"

namespace tpk {
namespace peer {

// Kernel parameter: PeerGroup by value.
struct Group {
  char* data[kMaxWorld];
  Flags* flags[kMaxWorld];
  int rank;
  int world;
  std::size_t half_bytes;
  std::uint64_t timeout_ns;
  ErrorRecord* error;

  __device__ char* lamport(int owner, int buffer, int source) const {
    const std::size_t slot = static_cast<std::size_t>(buffer) * world + source;
    return reinterpret_cast<char*>(flags[owner]) + kFlagBytes + slot * kLamportBytes;
  }
};

#ifdef __CUDACC__

// ---- accesses ------------------------------------------------------------------------------------------------------

__device__ inline void store_release(std::uint64_t* at, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}
__device__ inline std::uint64_t load_acquire(const std::uint64_t* at) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
__device__ inline std::uint32_t load_relaxed(const std::uint32_t* at) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Four words, each of them single-copy atomic; no order among them.
__device__ inline uint4 load_relaxed(const uint4* at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline void store_relaxed(uint4* at, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline std::uint64_t now_ns() {
  std::uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// ---- failing -------------------------------------------------------------------------------------------------------

// The first failure of this rank writes the host's record; later ones add nothing to it.
__device__ inline void fail(const Group& g, ErrorKind kind, int rank, std::uint64_t call, int phase) {
  if (atomicCAS(&g.flags[g.rank]->failed, 0u, 1u) != 0u) return;
  volatile ErrorRecord* record = g.error;
  record->kind = static_cast<std::uint32_t>(kind);
  record->rank = rank;
  record->block = blockIdx.x;
  record->call = call;
  record->phase = static_cast<std::uint32_t>(phase);
  record->waiter = static_cast<std::uint32_t>(g.rank);
  __threadfence_system();
  record->magic = kErrorMagic;
}

// Backs off and says whether to go on waiting. Without MPS, ranks that share a GPU run in turns of milliseconds: a rank
// that spins hard only burns its own turn, so after a burst of polls (some tens of microseconds) the wait sleeps
// between.
class Patience {
 public:
  __device__ explicit Patience(const Group& g) : group_(g) {}

  __device__ bool last() {
    if (++polls_ < kBurst) return true;
    if (polls_ == kBurst) start_ = now_ns();
    __nanosleep(200);
    if (polls_ % 16 == 0 && now_ns() - start_ > group_.timeout_ns) return false;
    // Rarely, because the record is behind PCIe: the host may have asked to stop, or another block has given up.
    if (polls_ % 1024 == 0 &&
        (load_relaxed(&group_.error->magic) != 0 || load_relaxed(&group_.flags[group_.rank]->failed) != 0))
      return false;
    return true;
  }

 private:
  static constexpr std::uint32_t kBurst = 128;
  const Group& group_;
  std::uint32_t polls_ = 0;
  std::uint64_t start_ = 0;
};

// ---- one call ------------------------------------------------------------------------------------------------------

struct Past {
  BlockState state;
  bool failed;  // an earlier call: nothing may be sent. May differ between threads if a block of this call has failed.
};

__device__ inline Past recall(const Group& g) {
  const Flags* own = g.flags[g.rank];
  Past past;
  // .cg: the record was written by the kernel before this one, on another multiprocessor.
  past.state.calls = __ldcg(&own->state[blockIdx.x].calls);
  past.state.lamport_calls = __ldcg(&own->state[blockIdx.x].lamport_calls);
  past.state.lamport_bytes = __ldcg(&own->state[blockIdx.x].lamport_bytes);
  past.state.unused = 0;
  past.failed = __ldcg(&own->failed) != 0;
  return past;
}

// Called by all threads of the block at the end of a call that succeeded here.
__device__ inline void remember(const Group& g, const BlockState& next) {
  __syncthreads();  // all threads of the block have read the old record
  Flags* own = g.flags[g.rank];
  const int blocks = static_cast<int>(gridDim.x);
  for (int b = static_cast<int>(blockIdx.x + threadIdx.x * gridDim.x); b < kMaxBlocks;
       b += static_cast<int>(blockDim.x) * blocks)
    if (advances(static_cast<int>(blockIdx.x), blocks, b)) own->state[b] = next;
}

// Raises the block's flag on all peers and waits for theirs; called by all threads. False for all of them if `skip` was
// true in any thread (then nothing is sent) or if a wait gave up. The block's earlier accesses come before the peers'
// later ones, and the peers' earlier ones before the block's later ones.
__device__ inline bool exchange(const Group& g, std::uint64_t call, int phase, bool skip) {
  if (__syncthreads_or(skip)) return false;
  bool lost = false;
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < g.world && peer != g.rank) {
    const std::uint64_t value = signal_value(call, phase);
    store_release(&g.flags[peer]->signal[blockIdx.x][g.rank], value);
    const std::uint64_t* flag = &g.flags[g.rank]->signal[blockIdx.x][peer];
    Patience patience(g);
    while (!lost && load_acquire(flag) < value) lost = !patience.last();
    if (lost) fail(g, ErrorKind::kSignal, peer, call, phase);
  }
  return !__syncthreads_or(lost);
}

#endif  // __CUDACC__

}  // namespace peer
}  // namespace tpk
