// Kernels for 8-bit weights on AVX-512 VNNI.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel/tables/int8_table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_avx512_vnni = int8_kernels<VectorTile>("avx512_vnni");
}  // namespace namernn_fast
