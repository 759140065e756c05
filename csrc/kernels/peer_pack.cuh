// 16-byte packs: conversion, loads that fall back to single elements, and the sum over ranks in rank order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/peer_sync.cuh"

namespace tpk {
namespace peer {

template <class T>
constexpr int kElements = static_cast<int>(kPackBytes / sizeof(T));

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ inline T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) {
  return x;
}
template <>
__device__ inline __half rounded<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
union Elements {
  uint4 pack;
  T value[kElements<T>];
  __device__ explicit Elements(uint4 p) : pack(p) {}
};

template <class T>
__device__ inline void unpack(uint4 pack, float (&out)[kElements<T>]) {
  const Elements<T> e(pack);
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k) out[k] = to_float(e.value[k]);
}
template <class T>
__device__ inline uint4 packed(const float (&x)[kElements<T>]) {
  Elements<T> e(uint4{});
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k) e.value[k] = rounded<T>(x[k]);
  return e.pack;
}

// ---- accesses ------------------------------------------------------------------------------------------------------

// Memory that other ranks write in the course of the kernel: read once, so not kept in L1.
__device__ inline uint4 load_shared(const void* at) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ inline void store_pack(void* at, uint4 v) { *static_cast<uint4*>(at) = v; }

// Elements [first, first + kElements) of `x`, of which those below `end` exist; zeros for the others.
template <class T>
__device__ inline uint4 load_elements(const T* x, std::size_t first, std::size_t end, bool vectors) {
  if (vectors && first + kElements<T> <= end) return *reinterpret_cast<const uint4*>(x + first);
  Elements<T> e(uint4{});
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k)
    if (first + k < end) e.value[k] = x[first + k];
  return e.pack;
}
template <class T>
__device__ inline void store_elements(T* out, std::size_t first, std::size_t end, bool vectors, uint4 pack) {
  if (vectors && first + kElements<T> <= end) {
    *reinterpret_cast<uint4*>(out + first) = pack;
    return;
  }
  const Elements<T> e(pack);
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k)
    if (first + k < end) out[first + k] = e.value[k];
}

// ---- sum over ranks ------------------------------------------------------------------------------------------------

// Packs arrive in v[step] from rank (own + step) % kWorld; afterwards v[r] is rank r's. The shift is made of fixed ones
// for each bit of the rank, because registers cannot be indexed at run time.
template <int kWorld>
__device__ inline void to_rank_order(uint4 (&v)[kWorld], int rank) {
#pragma unroll
  for (int shift = 1; shift < kWorld; shift *= 2) {
    const bool move = (rank & shift) != 0;
    uint4 w[kWorld];
#pragma unroll
    for (int r = 0; r < kWorld; ++r) {
      const uint4 from = v[(r + kWorld - shift) % kWorld];
      w[r].x = move ? from.x : v[r].x;
      w[r].y = move ? from.y : v[r].y;
      w[r].z = move ? from.z : v[r].z;
      w[r].w = move ? from.w : v[r].w;
    }
#pragma unroll
    for (int r = 0; r < kWorld; ++r) v[r] = w[r];
  }
}

template <class T>
__device__ inline void accumulate(uint4 pack, float (&sum)[kElements<T>]) {
  float x[kElements<T>];
  unpack<T>(pack, x);
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k) sum[k] += x[k];
}

// The same position in the memory of all ranks. kWorld is the number of ranks, or 0 for one known at run time only.
template <class T, int kWorld>
class Sources {
 public:
  __device__ Sources(const Group& g, std::size_t offset) : rank_(g.rank) {
#pragma unroll
    for (int step = 0; step < kWorld; ++step) base_[step] = g.data[(g.rank + step) % kWorld] + offset;
  }
  // Each rank starts with itself and goes round, so that at any time different links are asked.
  __device__ void load(std::size_t pack, uint4 (&v)[kWorld]) const {
#pragma unroll
    for (int step = 0; step < kWorld; ++step) v[step] = load_shared(base_[step] + pack * kPackBytes);
  }
  __device__ void add(uint4 (&v)[kWorld], float (&sum)[kElements<T>]) const {
    to_rank_order<kWorld>(v, rank_);
#pragma unroll
    for (int k = 0; k < kElements<T>; ++k) sum[k] = 0.0f;
#pragma unroll
    for (int r = 0; r < kWorld; ++r) accumulate<T>(v[r], sum);
  }
  __device__ void sum(std::size_t pack, float (&out)[kElements<T>]) const {
    uint4 v[kWorld];
    load(pack, v);
    add(v, out);
  }

  // Sums of kPacks packs at first, first + kStride, ...; zeros from `end` on. Eight loads in flight, or four
  // where the sums themselves take many registers.
  template <int kPacks, unsigned kStride>
  __device__ void sums(std::size_t first, std::size_t end, float (&out)[kPacks][kElements<T>]) const {
    constexpr int kLoads = kPacks > 2 ? 4 : 8;
    constexpr int kUnroll = kLoads / kWorld < kPacks ? kLoads / kWorld : kPacks;
#pragma unroll
    for (int k = 0; k < kPacks; k += kUnroll) {
      uint4 v[kUnroll][kWorld];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + (k + u) * kStride < end) load(first + (k + u) * kStride, v[u]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + (k + u) * kStride < end)
          add(v[u], out[k + u]);
        else
#pragma unroll
          for (int e = 0; e < kElements<T>; ++e) out[k + u][e] = 0.0f;
      }
    }
  }

  // calls `use(pack, sum)` for first, first + step, ... < end; eight loads in flight
  template <class Use>
  __device__ void for_each(std::size_t first, std::size_t step, std::size_t end, Use&& use) const {
    constexpr int kUnroll = 8 / kWorld;
    std::size_t i = first;
    if (kUnroll > 1) {
      for (; i + (kUnroll - 1) * step < end; i += kUnroll * step) {
        uint4 v[kUnroll][kWorld];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) load(i + u * step, v[u]);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          float total[kElements<T>];
          add(v[u], total);
          use(i + u * step, total);
        }
      }
    }
    for (; i < end; i += step) {
      float total[kElements<T>];
      sum(i, total);
      use(i, total);
    }
  }

 private:
  const char* base_[kWorld];
  const int rank_;
};

// Any number of ranks, four at a time, in rank order: this serves the rarer sizes (3, 5, 6, 7, 9...16).
template <class T>
class Sources<T, 0> {
 public:
  __device__ Sources(const Group& g, std::size_t offset) : group_(g), offset_(offset) {}

  __device__ void sum(std::size_t pack, float (&out)[kElements<T>]) const {
#pragma unroll
    for (int k = 0; k < kElements<T>; ++k) out[k] = 0.0f;
    const std::size_t at = offset_ + pack * kPackBytes;
    for (int first = 0; first < group_.world; first += 4) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < group_.world) v[j] = load_shared(group_.data[first + j] + at);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < group_.world) accumulate<T>(v[j], out);
    }
  }
  template <int kPacks, unsigned kStride>
  __device__ void sums(std::size_t first, std::size_t end, float (&out)[kPacks][kElements<T>]) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (first + k * kStride < end)
        sum(first + k * kStride, out[k]);
      else
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) out[k][e] = 0.0f;
    }
  }
  template <class Use>
  __device__ void for_each(std::size_t first, std::size_t step, std::size_t end, Use&& use) const {
    for (std::size_t i = first; i < end; i += step) {
      float total[kElements<T>];
      sum(i, total);
      use(i, total);
    }
  }

 private:
  const Group& group_;
  const std::size_t offset_;
};

// Moves units (packs or rows) that are divided into `parts` slices. This thread's positions are first, first + step,
// ... in every slice; the slices come in turn from `own` on (`own` itself is left out if `skip_own`). kBatch loads of
// kPacks packs are issued before the first of them is stored: the compiler cannot do that itself, because it has to
// assume that a store may change what the next load reads.
//   load(part, unit, v), store(unit, v) with uint4 v[kPacks]
template <int kBatch, int kPacks, class Load, class Store>
__device__ inline void move_units(std::size_t units, int parts, int own, bool skip_own, std::size_t first,
                                  std::size_t step, Load&& load, Store&& store) {
  constexpr std::uint32_t kNone = ~0u;
  const std::size_t length = slice_of(units, parts, 0).end;  // of the longest slice
  const int start = skip_own ? 1 : 0;
  if (start == parts) return;
  int turn = start;
#pragma unroll 1
  for (std::size_t j = first; j < length;) {
    uint4 v[kBatch][kPacks];
    std::uint32_t unit[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int part = own + turn < parts ? own + turn : own + turn - parts;
      const std::size_t u = static_cast<std::size_t>(part) * length + j;
      unit[b] = j < length && u < units ? static_cast<std::uint32_t>(u) : kNone;
      if (unit[b] != kNone) load(part, u, v[b]);
      if (++turn == parts) {
        turn = start;
        j += step;
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (unit[b] != kNone) store(static_cast<std::size_t>(unit[b]), v[b]);
  }
}

// Calls use(peer) for the other ranks, beginning after the own one.
template <class Use>
__device__ inline void for_each_peer(const Group& g, Use&& use) {
#pragma unroll 1
  for (int step = 1; step < g.world; ++step) {
    const int peer = g.rank + step < g.world ? g.rank + step : g.rank + step - g.world;
    use(peer);
  }
}

}  // namespace peer
}  // namespace tpk
