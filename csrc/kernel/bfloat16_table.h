// Defines the bfloat16 kernel table of an instruction set that multiplies pairs. The files in
// csrc/isa/ that define a PairTile include this header.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/all.h"

namespace namernn_fast {
namespace {

// Only waves and trees need panels and tables that outlive a call, and neither runs in bfloat16. So
// the functions that make such panels and tables are null.
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
