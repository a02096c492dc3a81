// Defines the kernel table of an instruction set for layers with 8-bit weights.
#pragma once

#include "kernel/cells/all.h"
#include "kernel/encoded_forward.h"
#include "kernel/int8_panels.h"

namespace namernn_fast {
namespace {

template <class Cell, class Encoding>
void forward_int8(const Forward<float>& args, const Runtime& runtime) {
  forward_encoded<Cell, Encoding>(args, args.layer.panels, runtime);
}

template <class Cell, class Encoding>
constexpr KernelsFor<float> int8_kernels_of_cell() {
  using Panels = Int8Panels<Cell, float>;
  KernelsFor<float> kernels{};
  kernels.forward_panels = {&Panels::bytes, &pack_all<Panels, float>, &unpack_all<Panels, float>};
  kernels.forward = &forward_int8<Cell, Encoding>;
  return kernels;
}

template <class Tile, class... Cells>
constexpr Int8Kernels int8_kernels_of_cells(CellList<Cells...>, const char* name) {
  return {{int8_kernels_of_cell<Cells, AsInt8<Tile>>()...}, name};
}

// Returns the kernels whose products Tile computes, under the name of its instructions.
template <class Tile>
constexpr Int8Kernels int8_kernels(const char* name) {
  return int8_kernels_of_cells<Tile>(AllCells(), name);
}

}  // namespace
}  // namespace namernn_fast
