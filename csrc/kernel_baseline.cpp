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
    {&packed_bytes<float>, &pack_weights<float>, &forward<float>, &backward<float>},
    {&packed_bytes<double>, &pack_weights<double>, &forward<double>, &backward<double>},
    {&packed_bytes<BFloat16>, &pack_weights<BFloat16>, &forward_widened<BFloat16>,
     &backward<BFloat16>},
    {&packed_bytes<Half>, &pack_weights<Half>, &forward_widened<Half>, &backward<Half>},
    "baseline",
    "baseline",
    Shape<float>::panel_width};
}  // namespace namernn_fast
