// 8-bit weights on the compiler's default target.
#define NAMERNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define NAMERNN_REGISTERS 32
#else
#define NAMERNN_REGISTERS 16
#endif
#include "kernel/int8_table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_baseline = int8_kernels<VectorTile>("baseline");
}  // namespace namernn_fast
