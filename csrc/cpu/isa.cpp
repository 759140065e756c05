// Chooses the kernel table once, by what the processor says.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace tpk {
namespace cpu {
namespace {

const Kernels* choose() {
  const char* wanted = std::getenv("TP_KERNELS_CPU_ISA");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed("avx512")) return &kAvx512Kernels;
  // "avx512" on a processor without it falls through to the best there is.
  if (avx2 && (allowed("avx2") || allowed("avx512"))) return &kAvx2Kernels;
#endif
  (void)allowed;
  return &kBaselineKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const table = choose();
  return *table;
}

}  // namespace cpu
}  // namespace tpk
