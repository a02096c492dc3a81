// bfloat16 kernels on AMX.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel/products/amx_tile.h"
#include "kernel/tables/pair_table.h"

namespace namernn_fast {
const KernelsFor<BFloat16> kernels_amx = kernels_on_pairs<BFloat16, 1>();
}  // namespace namernn_fast
