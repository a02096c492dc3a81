#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "kernel-inl.h"

namespace namernn_fast {
const Kernels kernels_avx512{
    {&PackedWeights<float>::bytes, &pack_all<PackedWeights<float>, float>, &forward<float>,
     &backward<float>},
    {&PackedWeights<double>::bytes, &pack_all<PackedWeights<double>, double>, &forward<double>,
     &backward<double>},
    {&PackedWeights<BFloat16>::bytes, &pack_all<PackedWeights<BFloat16>, BFloat16>,
     &forward_widened<BFloat16>, &backward<BFloat16>},
    {&PackedWeights<Half>::bytes, &pack_all<PackedWeights<Half>, Half>, &forward_widened<Half>,
     &backward<Half>},
    "avx512",
    "avx512",
    Shape<float>::panel_width};
}  // namespace namernn_fast
