// All-reduce + bias + residual + RMSNorm of a few rows by pushing (Lamport): every rank normalises all rows.
#include "kernels/peer_lamport.cuh"
#include "kernels/peer_norm.cuh"

namespace tpk {
namespace peer {
namespace {

template <class T, int kWorld, int kPacks, bool kVectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    norm_lamport_kernel(const __grid_constant__ Group g, const __grid_constant__ NormCall a) {
  __shared__ float shared[kNormShared<kPacks>];
  RowThreads<kPacks> t(a.row_threads, shared);
  const auto load = [&](std::size_t row, uint4(&v)[kPacks]) {
    load_row<T, kPacks, kVectors>(a, t, a.x, row, v);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) v[k] = sendable(v[k]);
  };
  std::size_t row = t.first_row();
  uint4 own[kPacks], residual[kPacks];
  if (row < a.rows) load(row, own);
  const Past past = recall(g);
  const std::uint64_t call = past.state.lamport_calls;
  bool lost = past.failed;
  if (!lost) {
    const int buffer = lamport_buffer(call);
    uint4 v[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) v[k] = own[k];
#pragma unroll 1
    for (std::size_t r = row; r < a.rows;) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (t.pack(k) < a.row_packs) push(g, buffer, r * a.row_packs + t.pack(k), v[k]);
      r += t.row_step();
      if (r < a.rows) load(r, v);
    }
    empty_previous(g, past.state);
  }
  const RowConstants<T, kPacks, kVectors> constants(a, t);
  if (row < a.rows) load_row<T, kPacks, kVectors>(a, t, a.residual, row, residual);
  // Block-uniform, because the threads of a row meet at barriers below.
  if (__syncthreads_or(lost)) return;
#pragma unroll 1
  for (; row < a.rows; row += t.row_step()) {
    float v[kPacks][kElements<T>] = {};
    const std::size_t begin = row * a.row_packs;
    if (!lost) lost = !receive<T, kWorld, kPacks, t.kStride>(g, call, begin + t.pack(0), begin + a.row_packs, own, v);
    // What did not come must not pass for a sum: the whole row becomes NaN, and the host will raise.
    if (lost) v[0][0] = __int_as_float(0x7fffffff);
    norm_row<T, kPacks, kVectors>(
        a, t, v, residual, constants,
        [&](std::size_t pack, uint4 x) {
          if (!lost) store_local<T, kVectors>(a, a.sum, row, pack, x);
        },
        [&](std::size_t pack, uint4 x) {
          if (!lost) store_local<T, kVectors>(a, a.normed, row, pack, x);
        });
    const std::size_t next = row + t.row_step();
    if (next < a.rows) {
      load(next, own);
      load_row<T, kPacks, kVectors>(a, t, a.residual, next, residual);
    }
  }
  finish_lamport(g, past.state, a.rows * a.row_packs * kPackBytes, lost);
}

}  // namespace

void launch_norm_lamport(const NormLaunch& n) {
  dispatch_norm(n, [&](auto type, auto world, auto packs, auto vectors, const NormCall& call, dim3 threads) {
    constexpr int kPacks = decltype(packs)::value;
    constexpr bool kVectors = decltype(vectors)::value != 0;
    // With two packs a thread, those of eight ranks at once would not fit the registers.
    constexpr int kWorld = decltype(world)::value == 8 && kPacks > 1 ? 0 : decltype(world)::value;
    if constexpr (kPacks <= 2 || !kVectors)  // rows are at most kMaxLamportRowPacks wide
      norm_lamport_kernel<typename decltype(type)::type, kWorld, kPacks, kVectors>
          <<<n.shape.blocks, threads, 0, n.stream>>>(n.group, call);
  });
}

}  // namespace peer
}  // namespace tpk
