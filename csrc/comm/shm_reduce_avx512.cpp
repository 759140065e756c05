// Reduction kernels for x86-64 processors with AVX-512. All headers come before the region compiled for it.
#include <cstddef>

#include "comm/shm_reduce.h"

using std::size_t;

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma,prefer-vector-width=512")
#endif

#define TPK_ISA isa_avx512
#define TPK_ISA_NAME "avx512"
#define TPK_LEVEL 3
#include "comm/shm_reduce_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tpk {
const ReduceKernels* reduce_kernels_avx512() { return &isa_avx512::kKernels; }
}  // namespace tpk
#else
namespace tpk {
const ReduceKernels* reduce_kernels_avx512() { return nullptr; }
}  // namespace tpk
#endif
