// The kernel table for bfloat16 on instructions that multiply pairs, for the files in csrc/isa/
// that define a PairTile.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/elman.h"
#include "kernel/cells/gru.h"
#include "kernel/cells/lstm.h"

namespace namernn_fast {
namespace {

// There are no functions for panels and tables that outlive a call: only waves and trees need them,
// and these do not run in bfloat16.
template <class Cell, KernelsOfCell Kernels::* kCell>
constexpr KernelsFor<BFloat16> kernels_of_cell_on_pairs() {
  return {{nullptr, nullptr},
          &forward_pairs<Cell, kCell>,
          {nullptr, nullptr},
          &backward<Cell, PairProducts<Cell>>,
          nullptr,
          8};
}

constexpr KernelsOnPairs kernels_on_pairs() {
  return {kernels_of_cell_on_pairs<Elman, &Kernels::elman>(),
          kernels_of_cell_on_pairs<Gru, &Kernels::gru>(),
          kernels_of_cell_on_pairs<Lstm, &Kernels::lstm>()};
}

}  // namespace
}  // namespace namernn_fast
