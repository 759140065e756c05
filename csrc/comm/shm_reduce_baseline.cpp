// Reduction kernels for any processor of the architecture (SSE2 on x86-64, NEON on AArch64).
#include <cstddef>

#include "comm/shm_reduce.h"

using std::size_t;

#define TPK_ISA isa_baseline
#define TPK_ISA_NAME "baseline"
#define TPK_LEVEL 0
#include "comm/shm_reduce_kernels.h"

namespace tpk {
const ReduceKernels* reduce_kernels_baseline() { return &isa_baseline::kKernels; }
}  // namespace tpk
