// Sum of several device buffers in a fixed order, accumulated in fp32.
#pragma once

#include <cstddef>

#include "common/dtype.h"
#include "common/status.h"

namespace tpk {

constexpr int kMaxReduceBuffers = 16;

// out[i] = round(sum over b = 0..count-1, in that order, of float(inputs[b][i])), fp32, bf16 or fp16.
// `inputs` is a host array of `count` device addresses; `out` may be one of them. `stream` is a cudaStream_t.
Status reduce_buffers(const void* const* inputs, int count, void* out, std::size_t n, DType dtype, void* stream);

}  // namespace tpk
