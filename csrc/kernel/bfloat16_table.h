// Defines the kernel tables of an instruction set that multiplies pairs of bfloat16. The files in
// csrc/isa/ that define a PairTile include this header.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/cells/all.h"
#include "kernel/encoded_forward.h"
#include "kernel/pair_panels.h"

namespace namernn_fast {
namespace {

// Rates that were measured on AMX. A product in place converts each bfloat16 weight for every tile
// of at most six rows, which takes three times as long as the product if few sequences share it.
template <class Storage>
constexpr PanelRate kPairRate = {24, 8};
template <>
constexpr PanelRate kPairRate<float> = {8, 24};

// The format in which layers of this type hold their panels. Rounding floats to terms loses bits,
// so float layers hold floats, in the format of the kernels that multiply floats.
template <class Cell, class Storage>
constexpr PanelFormat<Storage> kPanelFormat = {};
template <class Cell>
constexpr PanelFormat<BFloat16> kPanelFormat<Cell, BFloat16> = {
    &PairPanels<Cell, BFloat16, 1>::bytes, &pack_all<PairPanels<Cell, BFloat16, 1>, BFloat16>,
    &unpack_all<PairPanels<Cell, BFloat16, 1>, BFloat16>};

template <class Cell, class Storage, int kTerms>
void forward_pairs(const Forward<Storage>& args, const Runtime& runtime) {
  const Layer<Storage>& layer = args.layer;
  // Floats are prepared in the format of the kernels that multiply floats.
  const void* prepared = std::is_same_v<Storage, BFloat16> ? layer.panels : nullptr;
  if (!prepared && layer.in_place.weight_hh && (has_table(layer) || layer.in_place.weight_ih)) {
    // The instructions for pairs need weights in panels, so the float kernels run this call.
    const KernelsFor<Storage>& in_float = kKernelsInFloat.cells[size_t(Cell::kind)];
    Forward<Storage> floats = args;
    if (layer.panels) floats.layer.in_place = {};
    return in_float.forward(floats, runtime);
  }
  forward_encoded<Cell, AsTerms<kTerms>>(args, prepared, runtime);
}

// Waves and trees need tables and panels for the backward pass that outlive a call. They do not run
// on pairs, so the functions that make these are null.
template <class Cell, class Storage, int kTerms>
constexpr KernelsFor<Storage> kernels_of_cell_on_pairs() {
  return {kPanelFormat<Cell, Storage>,
          &forward_pairs<Cell, Storage, kTerms>,
          {nullptr, nullptr, nullptr},
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
