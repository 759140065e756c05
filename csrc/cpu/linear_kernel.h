// Skinny linear: the weights are streamed once for up to eight rows of x. Included by kernels_*.cpp only.
//
// Each output is one fp32 accumulator of sixteen lanes over k in order, then a fixed tree (simd.h), so its bits depend
// on neither the number of threads, nor the partition of rows, nor how many rows of x share the pass.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace tpk {
namespace cpu {
namespace TPK_ISA {

// Accumulators that fit into registers beside the operands: 32 zmm, 16 ymm (two a vector), 16 xmm or 32 NEON (four).
#if defined(__AVX512F__)
constexpr int kAccumulators = 16;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kAccumulators = 4;
#else
constexpr int kAccumulators = 2;
#endif
constexpr int kTileRows = 16;  // rows of w between two epilogues
constexpr int kTileCols = 8;   // rows of x in one pass

// Rows of w that are read side by side for M rows of x. One or two rows of x need no more than one: a single stream in
// memory order runs at the speed of a plain read and the hardware prefetches it (27 of 28 GB/s on Zen 4). With more
// rows of x a second row of w halves the loads of x (M = 8: 17 against 8 GB/s); element types of half the size want
// four.
template <class T, int M>
constexpr int rows_side_by_side() {
  return M <= 2 ? 1 : (M == 4 && sizeof(T) == 2) ? 4 : 2;
}

// Rows side by side are several short streams, which the hardware does not follow (12 GB/s): they are fetched into L2
// in the order of memory, this many bytes ahead.
constexpr ptrdiff_t kPrefetchBytes = 8192;

// part[m * kTileRows + r] = lane sums of R rows of w with M rows of x, not yet folded.
template <class T, int M, int R>
TPK_INLINE void dot_rows(const T* w, ptrdiff_t ldw, const float* x, ptrdiff_t ldx, ptrdiff_t k, vf* part) {
  vf acc[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) acc[m][r] = vf{};
  const char* ahead = reinterpret_cast<const char*>(w + R * ldw) + kPrefetchBytes;
  ptrdiff_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    vf wv[R];
    for (int r = 0; r < R; ++r) {
      wv[r] = load(w + r * ldw + i);
      if (R > 1) __builtin_prefetch(ahead + (i * R + r * kLanes) * static_cast<ptrdiff_t>(sizeof(T)), 0, 2);
    }
    for (int m = 0; m < M; ++m) {
      const vf xv = load(x + m * ldx + i);
      for (int r = 0; r < R; ++r) acc[m][r] += xv * wv[r];
    }
  }
  if (i < k) {
    for (int r = 0; r < R; ++r) {
      const vf wv = load_part(w + r * ldw + i, static_cast<int>(k - i));
      for (int m = 0; m < M; ++m) acc[m][r] += load(x + m * ldx + i) * wv;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) part[m * kTileRows + r] = acc[m][r];
}

template <class T, int M>
static __attribute__((noinline)) void dot_tile(const T* w, ptrdiff_t ldw, ptrdiff_t rows, const float* x, ptrdiff_t ldx,
                                               ptrdiff_t k, vf* part) {
  constexpr int kCols = M < kAccumulators ? M : kAccumulators;
  constexpr int kFit = kAccumulators / kCols;
  constexpr int kWanted = rows_side_by_side<T, M>();
  constexpr int kRows = kFit < kWanted ? kFit : kWanted;
  ptrdiff_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    for (int m = 0; m < M; m += kCols)
      dot_rows<T, kCols, kRows>(w + r * ldw, ldw, x + m * ldx, ldx, k, part + m * kTileRows + r);
  for (; r < rows; ++r)
    for (int m = 0; m < M; m += kCols)
      dot_rows<T, kCols, 1>(w + r * ldw, ldw, x + m * ldx, ldx, k, part + m * kTileRows + r);
}

template <class T>
TPK_INLINE void dot_tile(const T* w, ptrdiff_t ldw, ptrdiff_t rows, const float* x, ptrdiff_t ldx, ptrdiff_t m,
                         ptrdiff_t k, vf* part) {
  // 1, 2, 4 or 8 rows of x at a time; what is left over reads the tile again, from cache.
  for (ptrdiff_t i = 0; i < m;) {
    const ptrdiff_t left = m - i;
    const float* xi = x + i * ldx;
    vf* pi = part + i * kTileRows;
    if (left >= 8) {
      dot_tile<T, 8>(w, ldw, rows, xi, ldx, k, pi);
      i += 8;
    } else if (left >= 4) {
      dot_tile<T, 4>(w, ldw, rows, xi, ldx, k, pi);
      i += 4;
    } else if (left >= 2) {
      dot_tile<T, 2>(w, ldw, rows, xi, ldx, k, pi);
      i += 2;
    } else {
      dot_tile<T, 1>(w, ldw, rows, xi, ldx, k, pi);
      i += 1;
    }
  }
}

static __attribute__((noinline)) vf activate(vf x, int activation) {
  switch (activation) {
    case kSilu:
      return silu(x);
    case kRelu:
      return select((vi)(x < 0.0f), vf{}, x);
    case kGelu:
      for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.70710678118654752f));
      return x;
    case kGeluTanh: {
      const vf inner = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
      for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * (1.0f + __builtin_tanhf(inner[i]));
      return x;
    }
    default:
      return x;
  }
}

template <class T>
static void linear_rows(const LinearArgs& a, ptrdiff_t begin, ptrdiff_t end) {
  const T* w = static_cast<const T*>(a.w);
  const T* bias = static_cast<const T*>(a.bias);
  vf part[kTileCols * kTileRows] = {};
  vf part_up[kTileCols * kTileRows];
  for (ptrdiff_t n = begin; n < end; n += kTileRows) {
    const ptrdiff_t rows = end - n < kTileRows ? end - n : kTileRows;
    if (rows < kTileRows)
      for (vf& p : part) p = vf{};
    for (ptrdiff_t m0 = 0; m0 < a.m; m0 += kTileCols) {
      const ptrdiff_t cols = a.m - m0 < kTileCols ? a.m - m0 : kTileCols;
      const float* x = a.x + m0 * a.ldx;
      dot_tile(w + n * a.ldw, a.ldw, rows, x, a.ldx, cols, a.k, part);
      if (a.gated) {
        if (rows < kTileRows)
          for (vf& p : part_up) p = vf{};
        dot_tile(w + (a.n + n) * a.ldw, a.ldw, rows, x, a.ldx, cols, a.k, part_up);
      }
      for (ptrdiff_t m = 0; m < cols; ++m) {
        vf y = sum_lanes(part + m * kTileRows);
        if (bias) y += load_upto(bias + n, rows);
        y = activate(y, a.activation);
        if (a.gated) {
          vf up = sum_lanes(part_up + m * kTileRows);
          if (bias) up += load_upto(bias + a.n + n, rows);
          y *= up;
        }
        if (a.residual) y += load_upto(static_cast<const T*>(a.residual) + (m0 + m) * a.ldr + n, rows);
        store_upto(static_cast<T*>(a.out) + (m0 + m) * a.ldo + n, y, rows);
      }
    }
  }
}

template <class T>
static void widen_row(const void* in, float* out, ptrdiff_t n) {
  const T* p = static_cast<const T*>(in);
  for (ptrdiff_t i = 0; i < n; i += kLanes) store_upto(out + i, load_upto(p + i, n - i), n - i);
}

}  // namespace TPK_ISA
}  // namespace cpu
}  // namespace tpk
