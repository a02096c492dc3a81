// Detects, without torch, which kernels this processor can run and how large its L2 cache is.
#pragma once

#include "contract.h"

namespace namernn_fast {

// Returns the kernels for the best instruction set that this processor has and ATEN_CPU_CAPABILITY
// allows. Throws std::runtime_error if the build left out these kernels.
const Kernels& kernels();

// Returns the size of a core's L2 cache in bytes, or 1 MiB if the system does not report the size.
size_t l2_bytes();

// Returns the number of panels in a matrix with hidden_size columns, which is the maximum number of
// threads that can share the columns.
int64_t panels_of(int64_t hidden_size);

}  // namespace namernn_fast
