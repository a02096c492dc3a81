// Defines the kernel tables of an instruction set that multiplies pairs of bfloat16. The files in
// csrc/isa/ that define a PairTile include this header.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/all.h"

namespace namernn_fast {
namespace {

// Rates that were measured on AMX. A product in place converts each bfloat16 weight for every tile
// of at most six rows, which takes three times as long as the product if few sequences share it.
template <class Storage>
constexpr PanelRate kPairRate = {24, 8};
template <>
constexpr PanelRate kPairRate<float> = {8, 24};

// Waves and trees need panels and tables that outlive a call. They do not run on pairs, so the
// functions that make such panels and tables are null.
template <class Cell, class Storage, int kTerms>
constexpr KernelsFor<Storage> kernels_of_cell_on_pairs() {
  return {{nullptr, nullptr},
          &forward_pairs<Cell, Storage, kTerms>,
          {nullptr, nullptr},
          &backward<Cell, PairProducts<Cell, Storage, kTerms>>,
          nullptr,
          kPairRate<Storage>};
}

template <class Storage, int kTerms, class... Cells>
constexpr KernelsOnPairs<Storage> kernels_of_cells_on_pairs(CellList<Cells...>) {
  return {{kernels_of_cell_on_pairs<Cells, Storage, kTerms>()...}};
}

// Returns the kernels for tensors of type Storage, whose numbers are multiplied as kTerms terms.
template <class Storage, int kTerms>
constexpr KernelsOnPairs<Storage> kernels_on_pairs() {
  return kernels_of_cells_on_pairs<Storage, kTerms>(AllCells());
}

}  // namespace
}  // namespace namernn_fast
