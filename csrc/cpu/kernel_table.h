// Instantiates every kernel for the three element types. Included by kernels_*.cpp only, after TPK_ISA is defined.
#pragma once

#include "cpu/attention_kernel.h"
#include "cpu/elementwise_kernels.h"
#include "cpu/linear_kernel.h"

#define TPK_FOR_DTYPES(kernel) {kernel<float>, kernel<bf16>, kernel<f16>}

#define TPK_KERNEL_TABLE(name)    \
  {name,                          \
   TPK_FOR_DTYPES(linear_rows),   \
   TPK_FOR_DTYPES(widen_row),     \
   TPK_FOR_DTYPES(norm_rows),     \
   TPK_FOR_DTYPES(silu_mul_rows), \
   TPK_FOR_DTYPES(qkv_tokens),    \
   TPK_FOR_DTYPES(attend),        \
   TPK_FOR_DTYPES(combine),       \
   read_floats}
