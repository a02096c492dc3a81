#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel-inl.h"

namespace namernn_fast {
const Kernels kernels_avx512{"avx512", &forward<float>, &forward<double>, &backward<float>,
                             &backward<double>};
}  // namespace namernn_fast
