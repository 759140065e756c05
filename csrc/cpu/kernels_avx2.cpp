// The kernels for AVX2 + FMA + F16C; CMakeLists.txt gives this file its flags.
#if defined(__x86_64__)
#define TPK_ISA avx2
#include "cpu/kernel_table.h"

namespace tpk {
namespace cpu {
using namespace avx2;
const Kernels kAvx2Kernels = TPK_KERNEL_TABLE("avx2");
}  // namespace cpu
}  // namespace tpk
#endif
