// 8-bit weights on AVX-512, which multiplies 16-bit integers.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel/int8_table.h"

namespace namernn_fast {
const Int8Kernels int8_kernels_avx512 = int8_kernels<VectorTile>("avx512");
}  // namespace namernn_fast
