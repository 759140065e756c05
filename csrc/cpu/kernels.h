// What the instruction-set specific files provide, and their arguments. Plain C types only: see simd.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tpk {
namespace cpu {

enum Activation : int { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kNumActivations = 5 };

// Rows of out = epilogue(x @ w.T). Pointers without a type are of the table entry's element type.
struct LinearArgs {
  const float* x;  // [m, k] fp32, rows padded with zeros to a multiple of 16
  ptrdiff_t ldx;
  const void* w;  // [n, k], or [2 * n, k] when gated: gate rows above up rows
  ptrdiff_t ldw;
  const void* bias;      // [n] or [2 * n], or null
  const void* residual;  // [m, n] rows of ldr, or null
  ptrdiff_t ldr;
  void* out;  // [m, n] rows of ldo
  ptrdiff_t ldo;
  ptrdiff_t m, n, k;
  int activation;
  int gated;
};

struct NormArgs {
  const void* x;         // [rows, width]
  const void* residual;  // like x, or null
  const void* weight;    // [width]
  void* out;
  void* sum;  // x + residual, with residual
  ptrdiff_t width;
  float eps;
};

// Split, QK-norm, RoPE and cache write of token (row, t).
struct QkvArgs {
  const void* qkv;  // [batch, tokens, (hq + 2 * hkv) * d], token stride ld
  ptrdiff_t ld;
  const float* cos;  // [positions, d], row stride ldcos
  const float* sin;
  ptrdiff_t ldcos;
  const int64_t* lengths;    // [batch]
  const int64_t* positions;  // [batch or 1, tokens], or null: the cache slots
  ptrdiff_t positions_stride;
  void* q_out;    // [batch, tokens, hq, d]
  void* k_cache;  // [batch, hkv, max_len, d] with strides
  void* v_cache;
  ptrdiff_t k_batch, k_head, k_pos, v_batch, v_head, v_pos;
  const void* q_norm;  // [d] or null
  const void* k_norm;
  float eps;
  ptrdiff_t tokens, hq, hkv, d;
};

constexpr ptrdiff_t kSegment = 256;  // cache positions that one unit of attention work covers
constexpr ptrdiff_t kMaxHeadDim = 256;

struct AttentionArgs {
  const void* q;  // [batch, hq, tokens, d] with strides, last dimension dense
  ptrdiff_t q_batch, q_head, q_token;
  const void* k;  // [batch, hkv, max_len, d] with strides
  const void* v;
  ptrdiff_t k_batch, k_head, k_pos, v_batch, v_head, v_pos;
  const int64_t* lengths;
  void* out;       // [batch, tokens, hq, d] dense
  float* partial;  // [batch, hq, tokens, segments, 16 + d16]: max, sum, unused; then the weighted values
  ptrdiff_t segments, d16;
  ptrdiff_t batch, hq, hkv, tokens, d;
  ptrdiff_t window;  // 0 = none
  float scale;
};

struct Kernels {
  const char* name;
  // Rows [begin, end) of the output; begin is a multiple of 16.
  void (*linear[3])(const LinearArgs& args, ptrdiff_t begin, ptrdiff_t end);
  // n elements of T to fp32.
  void (*widen[3])(const void* in, float* out, ptrdiff_t n);
  void (*norm[3])(const NormArgs& args, ptrdiff_t begin, ptrdiff_t end);
  // Rows of silu(gate) * up; in [rows, 2 * width].
  void (*silu_mul[3])(const void* in, ptrdiff_t ld, void* out, ptrdiff_t width, ptrdiff_t begin, ptrdiff_t end);
  void (*qkv[3])(const QkvArgs& args, ptrdiff_t begin, ptrdiff_t end);
  // One (batch row, kv head, segment); then the segments of (batch row, query head) put together.
  void (*attend[3])(const AttentionArgs& args, ptrdiff_t row, ptrdiff_t kv_head, ptrdiff_t segment);
  void (*combine[3])(const AttentionArgs& args, ptrdiff_t row, ptrdiff_t head);
  // Sum of the floats [begin, end): a plain read, the bound that streaming kernels are measured against.
  float (*read)(const float* data, ptrdiff_t begin, ptrdiff_t end);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best table for this processor; TP_KERNELS_CPU_ISA=baseline|avx2|avx512 lowers it.
const Kernels& kernels();

}  // namespace cpu
}  // namespace tpk
