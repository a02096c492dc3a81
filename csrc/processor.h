// What this processor has: which kernels it runs, how large its caches are. Sees no torch.
#pragma once

#include "contract.h"

namespace namernn_fast {

// The kernels for the best instruction set of this processor that ATEN_CPU_CAPABILITY admits.
const Kernels& kernels();

// The size of a core's second-level cache, or a guess at it.
size_t l2_bytes();

// Column panels of a matrix hidden_size wide, which threads can share out.
int64_t panels_of(int64_t hidden_size);

}  // namespace namernn_fast
