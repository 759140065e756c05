// Entry points of the native CPU ops: validate, split into chunks, call the kernels of this processor.
//
// Addresses are of dense rows unless a stride (in elements) says otherwise; dtype is float32, bfloat16 or float16 and
// the same for all operands; `threads` counts the caller. A null address with work to do is an error, never a crash.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace tpk {
namespace cpu {

// out [m, n] = activation(x [m, k] @ w.T + bias) + residual; gated: activation(gate) * up with w [2 * n, k].
Status linear(void* out, const void* x, const void* w, const void* bias, const void* residual, std::ptrdiff_t m,
              std::ptrdiff_t n, std::ptrdiff_t k, std::ptrdiff_t ldx, std::ptrdiff_t ldw, std::ptrdiff_t ldr,
              DType dtype, int activation, bool gated, int threads);

// out = rms_norm(x) * weight; with residual: sum = x + residual first.
Status rms_norm(void* out, void* sum, const void* x, const void* residual, const void* weight, std::ptrdiff_t rows,
                std::ptrdiff_t width, double eps, DType dtype, int threads);

// out [rows, width] = silu(in[:, :width]) * in[:, width:]
Status silu_mul(void* out, const void* in, std::ptrdiff_t rows, std::ptrdiff_t width, DType dtype, int threads);

// A KV cache tensor [batch, heads, length, d], last dimension dense.
struct CacheView {
  void* data;
  std::ptrdiff_t batch_stride, head_stride, position_stride;
};

Status qkv_rope_cache(void* q_out, const void* qkv, const float* cos, const float* sin, const std::int64_t* lengths,
                      const std::int64_t* positions, std::ptrdiff_t positions_stride, CacheView k, CacheView v,
                      const void* q_norm, const void* k_norm, double eps, std::ptrdiff_t batch, std::ptrdiff_t tokens,
                      std::ptrdiff_t hq, std::ptrdiff_t hkv, std::ptrdiff_t d, std::ptrdiff_t max_len,
                      std::ptrdiff_t table_rows, DType dtype, int threads);

// out [batch, tokens, hq, d]; q [batch, hq, tokens, d] with strides; window 0 = none.
Status decode_attention(void* out, const void* q, std::ptrdiff_t q_batch, std::ptrdiff_t q_head, std::ptrdiff_t q_token,
                        CacheView k, CacheView v, const std::int64_t* lengths, std::ptrdiff_t batch,
                        std::ptrdiff_t tokens, std::ptrdiff_t hq, std::ptrdiff_t hkv, std::ptrdiff_t d,
                        std::ptrdiff_t max_len, std::ptrdiff_t window, double scale, DType dtype, int threads);

// Puts the 2 MiB-aligned inside of [data, data + bytes) into huge pages where the kernel allows it; the bytes
// concerned.
std::size_t advise_huge_pages(void* data, std::size_t bytes);

// Reads n floats with the given threads and does nothing else worth mentioning; their sum, in no fixed order.
float read_floats(const float* data, std::ptrdiff_t n, int threads);

// "avx512", "avx2" or "baseline".
const char* isa_name();

}  // namespace cpu
}  // namespace tpk
