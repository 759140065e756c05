// The kernels for whatever the compiler's default target is: SSE2 on x86-64, NEON on ARM.
#define TPK_ISA baseline
#include "cpu/kernel_table.h"

namespace tpk {
namespace cpu {
using namespace baseline;
const Kernels kBaselineKernels = TPK_KERNEL_TABLE("baseline");
}  // namespace cpu
}  // namespace tpk
