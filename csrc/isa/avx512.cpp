#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel/tables/table.h"

namespace namernn_fast {
constexpr Kernels kernels_avx512 = kernels_named("avx512", int8_kernels_avx2);
}  // namespace namernn_fast
