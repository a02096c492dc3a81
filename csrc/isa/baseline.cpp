// Kernels for the compiler's default target: SSE2 on x86-64, NEON on 64-bit ARM.
#define NAMERNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define NAMERNN_REGISTERS 32
#else
#define NAMERNN_REGISTERS 16
#endif
#include "kernel/tables/int8_table.h"
#include "kernel/tables/table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_baseline = int8_kernels<VectorTile>("baseline");
constexpr Kernels kernels_baseline = kernels_named("baseline", int8_kernels_baseline);
}  // namespace namernn_fast
