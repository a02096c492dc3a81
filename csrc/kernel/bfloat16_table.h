// Defines the kernel tables of an instruction set that multiplies pairs of bfloat16. The files in
// csrc/isa/ that define a PairTile include this header.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/all.h"

namespace namernn_fast {
namespace {

// Waves and trees need panels and tables that outlive a call. They run in float and double only, so
// the functions that make such panels and tables are null.
// A product in place converts each bfloat16 weight for every tile of at most six rows. With few
// sequences this takes about this many times as long as the product without the conversion.
constexpr int64_t kInPlaceConverts = 3;

template <class Cell, class Storage, int kTerms>
constexpr KernelsFor<Storage> kernels_of_cell_on_pairs() {
  return {{nullptr, nullptr},
          &forward_pairs<Cell, Storage, kTerms>,
          {nullptr, nullptr},
          &backward<Cell, PairProducts<Cell, Storage, kTerms>>,
          nullptr,
          std::is_same_v<Storage, float> ? PanelRate{8, 24} : PanelRate{24, 8}};
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
