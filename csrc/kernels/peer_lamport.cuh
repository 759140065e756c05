// Lamport exchange: every word that is not kEmptyWord is data, so nothing is signalled and no order is needed.
//
// A word equal to kEmptyWord is sent as 0: that turns -0.0 into +0.0 (in 16-bit pairs, the upper value of (+0, -0)),
// and a sum that starts at +0 is the same with either, so the bits are those of the other ordered kernels.
#pragma once

#include "kernels/peer_pack.cuh"

namespace tpk {
namespace peer {

__device__ inline uint4 sendable(uint4 v) {
  v.x = v.x == kEmptyWord ? 0u : v.x;
  v.y = v.y == kEmptyWord ? 0u : v.y;
  v.z = v.z == kEmptyWord ? 0u : v.z;
  v.w = v.w == kEmptyWord ? 0u : v.w;
  return v;
}
__device__ inline bool arrived(uint4 v) {
  return v.x != kEmptyWord && v.y != kEmptyWord && v.z != kEmptyWord && v.w != kEmptyWord;
}

// Sends one pack to the own slot of all peers.
__device__ inline void push(const Group& g, int buffer, std::size_t pack, uint4 v) {
  for_each_peer(g, [&](int peer) {
    store_relaxed(reinterpret_cast<uint4*>(g.lamport(peer, buffer, g.rank) + pack * kPackBytes), v);
  });
}

// Empties what the call before this one received; see peer_sync.cuh for why that buffer. All threads of the grid.
__device__ inline void empty_previous(const Group& g, const BlockState& past) {
  const std::size_t packs = past.lamport_bytes / kPackBytes;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  const int buffer = lamport_emptied(past.lamport_calls);
  const uint4 empty{kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord};
  for_each_peer(g, [&](int peer) {
    char* slot = g.lamport(g.rank, buffer, peer);
    for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += step)
      store_pack(slot + i * kPackBytes, empty);
  });
}

// Sums over ranks of the packs first, first + kStride, ..., of which the own parts are `own`; zeros for packs from
// `end` on. False if something did not come; the sums are then unfinished.
template <class T, int kWorld, int kPacks, unsigned kStride>
__device__ inline bool receive(const Group& g, std::uint64_t call, std::size_t first, std::size_t end,
                               const uint4 (&own)[kPacks], float (&sum)[kPacks][kElements<T>]) {
  const int buffer = lamport_buffer(call);
  Patience patience(g);
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) sum[k][e] = 0.0f;
  if constexpr (kWorld > 0) {
    uint4 v[kPacks][kWorld];
    const char* slot[kWorld];
#pragma unroll
    for (int s = 1; s < kWorld; ++s) slot[s] = g.lamport(g.rank, buffer, (g.rank + s) % kWorld) + first * kPackBytes;
    bool complete;
    do {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
#pragma unroll
        for (int s = 1; s < kWorld; ++s) {
          v[k][s] = uint4{};
          if (first + k * kStride < end)
            v[k][s] = load_relaxed(reinterpret_cast<const uint4*>(slot[s] + k * kStride * kPackBytes));
        }
      complete = true;
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
#pragma unroll
        for (int s = 1; s < kWorld; ++s) complete = complete && arrived(v[k][s]);
    } while (!complete && patience.last());
    if (!complete) {
#pragma unroll
      for (int s = kWorld - 1; s > 0; --s)
#pragma unroll
        for (int k = 0; k < kPacks; ++k)
          if (!arrived(v[k][s])) fail(g, ErrorKind::kData, (g.rank + s) % kWorld, call, 0);
      return false;
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      v[k][0] = own[k];
      to_rank_order<kWorld>(v[k], g.rank);
#pragma unroll
      for (int r = 0; r < kWorld; ++r) accumulate<T>(v[k][r], sum[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      for (int r = 0; r < g.world && first + k * kStride < end; ++r) {
        uint4 v = own[k];
        if (r != g.rank) {
          const char* slot = g.lamport(g.rank, buffer, r) + (first + k * kStride) * kPackBytes;
          while (!arrived(v = load_relaxed(reinterpret_cast<const uint4*>(slot)))) {
            if (patience.last()) continue;
            fail(g, ErrorKind::kData, r, call, 0);
            return false;
          }
        }
        accumulate<T>(v, sum[k]);
      }
    }
  }
  return true;
}

// Ends a Lamport call that used `bytes` of every slot; all threads. False if `lost` was true in one.
__device__ inline bool finish_lamport(const Group& g, const BlockState& past, std::size_t bytes, bool lost) {
  if (__syncthreads_or(lost)) return false;
  BlockState next = past;
  next.lamport_calls = past.lamport_calls + 1;
  next.lamport_bytes = bytes;
  remember(g, next);
  return true;
}

}  // namespace peer
}  // namespace tpk
