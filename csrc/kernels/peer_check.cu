// What the peer-memory kernels rely on, tried: stores, loads and atomics of a kernel on a peer's memory, ordered by
// flags.
#include "kernels/peer_launch.cuh"
#include "kernels/peer_pack.cuh"

namespace tpk {
namespace peer {
namespace {

// ---- kernels -------------------------------------------------------------------------------------------------------

constexpr int kCheckThreads = 256;
constexpr std::uint32_t kAdds = kCheckThreads;  // by each block to each counter: one a thread

// Different in every word, pair and call; `kind` tells stored from own data.
__device__ inline std::uint32_t pattern(std::uint32_t seed, int kind, int from, int to, std::size_t word) {
  std::uint32_t h = seed ^ (static_cast<std::uint32_t>(word) * 0x9e3779b1u);
  h ^= static_cast<std::uint32_t>((kind * kMaxWorld + from) * kMaxWorld + to) * 0x85ebca77u;
  h ^= h >> 15;
  return h * 0xc2b2ae3du;
}
__device__ inline uint4 pattern4(std::uint32_t seed, int kind, int from, int to, std::size_t pack) {
  return {pattern(seed, kind, from, to, 4 * pack), pattern(seed, kind, from, to, 4 * pack + 1),
          pattern(seed, kind, from, to, 4 * pack + 2), pattern(seed, kind, from, to, 4 * pack + 3)};
}
__device__ inline std::uint32_t differing(uint4 a, uint4 b) {
  return (a.x != b.x) + (a.y != b.y) + (a.z != b.z) + (a.w != b.w);
}

// The half holds [world] slots that peers store to, one slot that peers load, and [world] counters. A block reads what
// blocks of its own index wrote; its counters are apart from those of other blocks, being checked by it alone.
__global__ void __launch_bounds__(kCheckThreads)
    check_kernel(const __grid_constant__ Group g, std::size_t packs, std::uint32_t seed, std::uint32_t* report) {
  const std::size_t first = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  const Past past = recall(g);
  const std::uint64_t call = past.state.calls;
  const std::size_t half = half_of(call) * g.half_bytes;
  const auto slot = [&](int owner, int index) { return g.data[owner] + half + index * packs * kPackBytes; };
  const auto counters = [&](int owner) {
    return reinterpret_cast<std::uint32_t*>(slot(owner, g.world + 1)) + blockIdx.x * kMaxWorld;
  };
  if (!past.failed) {
    for (std::size_t i = first; i < packs; i += step)
      store_pack(slot(g.rank, g.world) + i * kPackBytes, pattern4(seed, 1, g.rank, 0, i));
    // Never a remainder of an earlier check that used the same seed.
    for (int r = 0; r < g.world; ++r)
      for (std::size_t i = first; i < packs; i += step)
        store_pack(slot(g.rank, r) + i * kPackBytes, pattern4(~seed, 2, r, g.rank, i));
    if (threadIdx.x < kMaxWorld) counters(g.rank)[threadIdx.x] = 0;
  }
  if (!exchange(g, call, 0, past.failed)) return;

  for_each_peer(g, [&](int peer) {
    for (std::size_t i = first; i < packs; i += step)
      store_pack(slot(peer, g.rank) + i * kPackBytes, pattern4(seed, 0, g.rank, peer, i));
    atomicAdd_system(counters(peer) + g.rank, 1u);
    std::uint32_t wrong = 0;
    for (std::size_t i = first; i < packs; i += step)
      wrong += differing(load_shared(slot(peer, g.world) + i * kPackBytes), pattern4(seed, 1, peer, 0, i));
    if (wrong != 0) atomicAdd(report + g.world + peer, wrong);
  });
  if (!exchange(g, call, 1, false)) return;

  for_each_peer(g, [&](int peer) {
    std::uint32_t wrong = 0;
    for (std::size_t i = first; i < packs; i += step)
      wrong += differing(load_shared(slot(g.rank, peer) + i * kPackBytes), pattern4(seed, 0, peer, g.rank, i));
    if (wrong != 0) atomicAdd(report + peer, wrong);
    if (threadIdx.x == 0) {
      const std::uint32_t adds = load_relaxed(counters(g.rank) + peer);
      if (adds != kAdds) atomicAdd(report + 2 * g.world + peer, adds > kAdds ? adds - kAdds : kAdds - adds);
    }
  });
  BlockState next = past.state;
  next.calls = call + 1;
  remember(g, next);
}

}  // namespace

// ---- launcher ------------------------------------------------------------------------------------------------------

Status check(const PeerGroup& g, std::size_t bytes, std::uint32_t seed, std::uint32_t* report) {
  const char* what = "peer check";
  Status status = check_group(what, g);
  if (!status.ok()) return status;
  if (report == nullptr) return invalid(what, "the report's address is null");
  if (bytes == 0 || bytes > g.half_bytes || check_half_bytes(g.world, bytes) > g.half_bytes)
    return invalid(what, std::to_string(bytes) + " bytes a pair do not fit a half of " + std::to_string(g.half_bytes) +
                             " bytes, or are none");
  const std::size_t packs = ceil_div(bytes, kPackBytes);
  const auto stream = static_cast<cudaStream_t>(g.stream);
  const std::size_t words = 3 * static_cast<std::size_t>(g.world);
  const cudaError_t error = cudaMemsetAsync(report, 0, words * sizeof(std::uint32_t), stream);
  if (error != cudaSuccess) return Status::Error(Code::kCuda, std::string(what) + ": " + cudaGetErrorString(error));
  const auto blocks = static_cast<unsigned>(
      smaller(ceil_div(packs, kCheckThreads), static_cast<std::size_t>(usable_blocks(g.max_blocks))));
  check_kernel<<<blocks, kCheckThreads, 0, stream>>>(group_of(g), packs, seed, report);
  return launched(what);
}

}  // namespace peer
}  // namespace tpk
