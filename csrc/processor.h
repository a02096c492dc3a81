// What this processor offers: the kernels that it can run and the size of its L2 cache. Does not
// use torch.
#pragma once

#include "contract.h"

namespace namernn_fast {

// The kernels for the best instruction set that this processor has and ATEN_CPU_CAPABILITY allows.
const Kernels& kernels();

// The kernels of one cell, from kernels().
const KernelsOfCell& kernels_of(CellKind cell);

// The size of a core's L2 cache, or a guess if the system does not report it.
size_t l2_bytes();

// Number of column panels in a matrix with hidden_size columns: the maximum number of threads that
// can share the columns.
int64_t panels_of(int64_t hidden_size);

}  // namespace namernn_fast
