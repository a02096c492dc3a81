// Whatever the compiler targets by default: SSE2 on x86-64, NEON on 64-bit ARM.
#define NAMERNN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define NAMERNN_REGISTERS 32
#else
#define NAMERNN_REGISTERS 16
#endif
#include "kernel-inl.h"

namespace namernn_fast {
const Kernels kernels_baseline{
    {&PackedWeights<float>::bytes, &pack_all<PackedWeights<float>, float>, &forward<float>,
     &backward<float>},
    {&PackedWeights<double>::bytes, &pack_all<PackedWeights<double>, double>, &forward<double>,
     &backward<double>},
    {&PackedWeights<BFloat16>::bytes, &pack_all<PackedWeights<BFloat16>, BFloat16>,
     &forward_widened<BFloat16>, &backward<BFloat16>},
    {&PackedWeights<Half>::bytes, &pack_all<PackedWeights<Half>, Half>, &forward_widened<Half>,
     &backward<Half>},
    "baseline",
    "baseline",
    Shape<float>::panel_width};
}  // namespace namernn_fast
