// The kernel table for bfloat16 on instructions that multiply pairs, for the files in csrc/isa/
// that define a PairTile.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/all.h"

namespace namernn_fast {
namespace {

// The functions for panels and tables that outlive a call are null, because only waves and trees
// need them, and neither runs in bfloat16.
template <class Cell>
constexpr KernelsFor<BFloat16> kernels_of_cell_on_pairs() {
  return {{nullptr, nullptr},
          &forward_pairs<Cell>,
          {nullptr, nullptr},
          &backward<Cell, PairProducts<Cell>>,
          nullptr,
          8};
}

template <class... Cells>
constexpr KernelsOnPairs kernels_of_cells_on_pairs(CellList<Cells...>) {
  return {{kernels_of_cell_on_pairs<Cells>()...}};
}

constexpr KernelsOnPairs kernels_on_pairs() { return kernels_of_cells_on_pairs(AllCells()); }

}  // namespace
}  // namespace namernn_fast
