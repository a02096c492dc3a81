// Kernels for 8-bit weights on AVX-VNNI.
#define NAMERNN_VECTOR_BYTES 32
#define NAMERNN_REGISTERS 16
#include "kernel/tables/int8_table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_avx_vnni = int8_kernels<VectorTile>("avx_vnni");
}  // namespace namernn_fast
