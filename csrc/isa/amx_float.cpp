// float kernels on AMX, which split each number into one or two bfloat16 terms.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel/products/amx_tile.h"
#include "kernel/tables/pair_table.h"

namespace namernn_fast {
const KernelsFor<float> kernels_amx_float[kMostTerms] = {kernels_on_pairs<float, 1>(),
                                                         kernels_on_pairs<float, 2>()};
}  // namespace namernn_fast
