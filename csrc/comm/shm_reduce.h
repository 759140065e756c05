// Elementwise reductions and copies over host memory, compiled once per instruction set and chosen at run time.
//
// Numerics: dst[i] = src[0][i] op src[1][i] op ... in exactly this order. Sums of float32, bfloat16 and float16 are
// accumulated in float32 and rounded to the dtype once, at the end; float64 in float64; integers wrap. The bits of an
// element depend on neither its position, the instruction set nor how a message was cut. NaN wins in a maximum.
#pragma once

#include <cstddef>

#include "common/dtype.h"

namespace tpk {

enum class ReduceOp : int { kSum = 0, kMax = 1 };
constexpr int kNumReduceOps = 2;

constexpr const char* name_of(ReduceOp op) { return op == ReduceOp::kSum ? "sum" : "max"; }

// dst may be one of the sources (same address), never a shifted overlap of one.
using ReduceFn = void (*)(void* dst, const void* const* src, int num_src, std::size_t count);
using CopyFn = void (*)(void* dst, const void* src, std::size_t bytes);

struct ReduceKernels {
  const char* name;
  ReduceFn reduce[kNumDTypes][kNumReduceOps];
  // The same with stores that bypass the cache, for results that will not be read from it again.
  ReduceFn reduce_streaming[kNumDTypes][kNumReduceOps];
  CopyFn copy_streaming;
};

// One table per instruction set; null where the compiler or the architecture does not have it.
const ReduceKernels* reduce_kernels_baseline();
const ReduceKernels* reduce_kernels_avx2();
const ReduceKernels* reduce_kernels_avx512();

// The best table this processor can run, found once. TP_KERNELS_ISA=baseline|avx2|avx512 lowers the choice (for tests).
const ReduceKernels& reduce_kernels();

}  // namespace tpk
