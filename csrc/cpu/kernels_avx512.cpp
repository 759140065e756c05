// The kernels for AVX-512 (F, BW, DQ, VL); CMakeLists.txt gives this file its flags.
#if defined(__x86_64__)
#define TPK_ISA avx512
#include "cpu/kernel_table.h"

namespace tpk {
namespace cpu {
using namespace avx512;
const Kernels kAvx512Kernels = TPK_KERNEL_TABLE("avx512");
}  // namespace cpu
}  // namespace tpk
#endif
