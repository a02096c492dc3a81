#define NAMERNN_VECTOR_BYTES 32
#define NAMERNN_REGISTERS 16
#include "kernel-inl.h"

namespace namernn_fast {
const Kernels kernels_avx2{"avx2", &forward<float>, &forward<double>, &backward<float>,
                           &backward<double>};
}  // namespace namernn_fast
