#define NAMERNN_VECTOR_BYTES 32
#define NAMERNN_REGISTERS 16
#include "kernel-inl.h"

namespace namernn_fast {
const Kernels kernels_avx2{
    {&packed_bytes<float>, &pack_weights<float>, &forward<float>, &backward<float>},
    {&packed_bytes<double>, &pack_weights<double>, &forward<double>, &backward<double>},
    {&packed_bytes<BFloat16>, &pack_weights<BFloat16>, &forward_widened<BFloat16>,
     &backward<BFloat16>},
    {&packed_bytes<Half>, &pack_weights<Half>, &forward_widened<Half>, &backward<Half>},
    "avx2",
    "avx2",
    Shape<float>::panel_width};
}  // namespace namernn_fast
