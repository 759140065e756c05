#include "comm/shm_reduce.h"

#include <cstdlib>
#include <cstring>

namespace tpk {
namespace {

const ReduceKernels* choose() {
  const char* wanted = std::getenv("TP_KERNELS_ISA");
  const ReduceKernels* best = reduce_kernels_baseline();
  if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return best;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = reduce_kernels_avx2();
    if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return best;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = reduce_kernels_avx512();
  }
#endif
  return best;
}

}  // namespace

const ReduceKernels& reduce_kernels() {
  static const ReduceKernels* const chosen = choose();
  return *chosen;
}

}  // namespace tpk
