#define NAMERNN_VECTOR_BYTES 32
#define NAMERNN_REGISTERS 16
#include "kernel/tables/int8_table.h"
#include "kernel/tables/table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_avx2 = int8_kernels<VectorTile>("avx2");
constexpr Kernels kernels_avx2 = kernels_named("avx2", int8_kernels_avx2);
}  // namespace namernn_fast
