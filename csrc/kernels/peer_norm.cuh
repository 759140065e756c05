// One row of all-reduce + bias + residual + RMSNorm, after its sum over ranks is in registers.
//
// The sum of squares is always formed in the same order, whatever the number of threads: within a pack one element
// after the other, over 32 packs (512 bytes of the row) by a butterfly, over those chunks one after the other. So a row
// has the same bits from the one-shot, the two-shot and the Lamport kernel, and from any number of rows.
#pragma once

#include <algorithm>

#include "kernels/peer_launch.cuh"
#include "kernels/peer_pack.cuh"

namespace tpk {
namespace peer {

// Kernel parameter.
struct NormCall {
  const void* x;
  const void* bias;
  const void* residual;
  const void* weight;
  void* normed;
  void* sum;
  std::size_t rows, width, row_packs;
  std::size_t sum_area;  // in the half, behind the normed rows: sums to be gathered
  float eps;
  int row_threads;
  bool round_first, gather_sum;
  bool push;  // two-shot: outputs are registered, and written on all ranks by the rank that has them
  Place in, normed_to, sum_to;
};

template <class T>
__device__ inline float round_to(float x) {
  return to_float(rounded<T>(x));
}

// The threads that hold one row, and a thread's place among them.
template <int kPacks>
class RowThreads {
 public:
  __device__ RowThreads(int row_threads, float* shared)
      : threads_(row_threads),
        group_(static_cast<int>(threadIdx.x) / row_threads),
        warp_(static_cast<int>(threadIdx.x) % row_threads / 32),
        chunks_(kPacks * row_threads / 32),
        shared_(shared + 2 * group_ * chunks_) {}

  // A warp has kPacks chunks of 32 packs, one after the other: a stride the compiler knows saves address registers.
  static constexpr unsigned kStride = 32;
  __device__ unsigned pack(int k) const { return (warp_ * kPacks + k) * kStride + threadIdx.x % 32; }
  // Rows of this group are first_row(), first_row() + row_step(), ...
  __device__ std::size_t first_row() const { return static_cast<std::size_t>(blockIdx.x) * groups() + group_; }
  __device__ std::size_t row_step() const { return static_cast<std::size_t>(gridDim.x) * groups(); }

  // Sum over the row of `squares` (one a pack), the same in all its threads.
  __device__ float sum(const float (&squares)[kPacks]) {
    // Two sets in turn: a thread may still read the last row's when others write this row's.
    float* chunk = shared_ + turn_ * chunks_;
    turn_ ^= 1;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float s = squares[k];
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) s += __shfl_xor_sync(0xffffffffu, s, mask);
      if (threadIdx.x % 32 == 0) chunk[warp_ * kPacks + k] = s;
    }
    sync();
    float total = 0.0f;
#pragma unroll 4
    for (int c = 0; c < chunks_; ++c) total += chunk[c];
    return total;
  }

 private:
  __device__ int groups() const { return static_cast<int>(blockDim.x) / threads_; }
  __device__ void sync() const {
    if (threads_ == 32)
      __syncwarp();
    else if (threads_ == static_cast<int>(blockDim.x))
      __syncthreads();
    else  // barriers 1 to 8: a group of 64 threads or more in a block of 512; 0 is that of the whole block
      asm volatile("bar.sync %0, %1;" ::"r"(group_ + 1), "r"(threads_) : "memory");
  }

  const int threads_, group_, warp_, chunks_;
  float* const shared_;
  int turn_ = 0;
};

// Shared memory of a kernel: two sets of chunks for each warp of the block.
template <int kPacks>
constexpr int kNormShared = 2 * kPacks * 32;

template <bool kVectors, class T>
__device__ inline uint4 load_some(const T* x, std::size_t first, std::size_t end) {
  if constexpr (kVectors) return *reinterpret_cast<const uint4*>(x + first);
  return load_elements(x, first, end, false);
}

// kVectors: all rows of all tensors begin at a multiple of 16 bytes.
template <class T, int kPacks, bool kVectors>
__device__ inline void load_row(const NormCall& a, const RowThreads<kPacks>& t, const void* tensor, std::size_t row,
                                uint4 (&v)[kPacks]) {
  const T* from = static_cast<const T*>(tensor) + row * a.width;
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    v[k] = t.pack(k) < a.row_packs ? load_some<kVectors>(from, t.pack(k) * kElements<T>, a.width) : uint4{};
}

// Bias and weight, for a thread's columns. Loaded while the peers are waited for and kept for all rows; with many packs
// a thread they would take the registers of the loads in flight, and are read again (from L1) for each row.
template <class T, int kPacks, bool kVectors>
class RowConstants {
 public:
  static constexpr bool kKept = kPacks <= 2;
  __device__ RowConstants(const NormCall& a, const RowThreads<kPacks>& t) : a_(a), t_(t) {
    if (!kKept) return;
    load_row<T, kPacks, kVectors>(a, t, a.weight, 0, weight_);
    if (a.bias != nullptr) load_row<T, kPacks, kVectors>(a, t, a.bias, 0, bias_);
  }
  __device__ void bias(uint4 (&v)[kPacks]) const { get(a_.bias, bias_, v); }
  __device__ void weight(uint4 (&v)[kPacks]) const { get(a_.weight, weight_, v); }

 private:
  __device__ void get(const void* tensor, const uint4 (&kept)[kPacks], uint4 (&v)[kPacks]) const {
    if (kKept) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        v[k] = kept[k];
        // Else the compiler converts them once and keeps all of them in fp32, in twice the registers.
        asm volatile("" : "+r"(v[k].x), "+r"(v[k].y), "+r"(v[k].z), "+r"(v[k].w));
      }
    } else {
      load_row<T, kPacks, kVectors>(a_, t_, tensor, 0, v);
    }
  }
  const NormCall& a_;
  const RowThreads<kPacks>& t_;
  uint4 weight_[kPacks], bias_[kPacks];
};

// v: sums over ranks in fp32, zero beyond the row. Calls store_sum(pack, values) and store_normed(pack, values) for the
// packs of this thread.
template <class T, int kPacks, bool kVectors, class StoreSum, class StoreNormed>
__device__ inline void norm_row(const NormCall& a, RowThreads<kPacks>& t, float (&v)[kPacks][kElements<T>],
                                const uint4 (&residual)[kPacks], const RowConstants<T, kPacks, kVectors>& constants,
                                StoreSum&& store_sum, StoreNormed&& store_normed) {
  uint4 bias[kPacks], weight[kPacks];
  if (a.bias != nullptr) constants.bias(bias);
  float squares[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float r[kElements<T>], b[kElements<T>];
    unpack<T>(residual[k], r);
    if (a.bias != nullptr) unpack<T>(bias[k], b);
    squares[k] = 0.0f;
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) {
      float s = v[k][e];
      if (a.round_first) s = round_to<T>(s);
      if (a.bias != nullptr) s = a.round_first ? round_to<T>(s + b[e]) : s + b[e];
      s += r[e];
      if (a.round_first) s = round_to<T>(s);
      v[k][e] = s;
      squares[k] = __fmaf_rn(s, s, squares[k]);
    }
    if (t.pack(k) < a.row_packs) store_sum(t.pack(k), packed<T>(v[k]));
  }
  // div.full and rsqrt are what ops.add_rms_norm's kernel compiles to, so that equal sums give equal bits.
  float mean;
  asm("div.full.f32 %0, %1, %2;" : "=f"(mean) : "f"(t.sum(squares)), "f"(static_cast<float>(a.width)));
  const float scale = rsqrtf(mean + a.eps);
  constants.weight(weight);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    float w[kElements<T>];
    unpack<T>(weight[k], w);
#pragma unroll
    for (int e = 0; e < kElements<T>; ++e) {
      const float s = v[k][e] * scale;
      v[k][e] = (a.round_first ? round_to<T>(s) : s) * w[e];
    }
    if (t.pack(k) < a.row_packs) store_normed(t.pack(k), packed<T>(v[k]));
  }
}

template <class T, bool kVectors>
__device__ inline void store_local(const NormCall& a, void* tensor, std::size_t row, std::size_t pack, uint4 v) {
  T* to = static_cast<T*>(tensor) + row * a.width;
  if constexpr (kVectors)
    store_pack(to + pack * kElements<T>, v);
  else
    store_elements(to, pack * kElements<T>, a.width, false, v);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

struct NormLaunch {
  Algorithm algorithm;
  Group group;
  NormCall call;
  NormShape shape;
  DType dtype;
  bool vectors;
  cudaStream_t stream;
};
// One per file of kernels; arguments are checked already.
void launch_norm_pull(const NormLaunch& launch);
void launch_norm_lamport(const NormLaunch& launch);

// launch(Type<T>, Constant<kWorld>, Constant<kPacks>, Constant<kVectors>, call, threads). Aligned rows of 16-bit types,
// which is what models run, have kernels of their own. The others share one: its blocks hold the same rows, since ranks
// may differ in the alignment of their tensors, and how many threads a row has does not show in the bits.
template <class Launch>
void dispatch_norm(const NormLaunch& n, Launch&& launch) {
  dispatch(n.dtype, n.vectors ? n.group.world : 0, [&](auto type, auto world) {
    if constexpr (sizeof(typename decltype(type)::type) == 2) {
      if (n.vectors) {
        if (n.shape.packs == 1) return launch(type, world, Constant<1>{}, Constant<1>{}, n.call, n.shape.threads);
        if (n.shape.packs == 2) return launch(type, world, Constant<2>{}, Constant<1>{}, n.call, n.shape.threads);
        return launch(type, world, Constant<4>{}, Constant<1>{}, n.call, n.shape.threads);
      }
    }
    NormCall call = n.call;
    call.row_threads = std::max(32, n.shape.row_threads * n.shape.packs / 4);
    const int rows = n.shape.threads / n.shape.row_threads;
    launch(type, Constant<0>{}, Constant<4>{}, Constant<0>{}, call, rows * call.row_threads);
  });
}

}  // namespace peer
}  // namespace tpk
