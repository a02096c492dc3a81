// Defines the kernel table of one instruction set. The files in csrc/isa/ include this header.
#pragma once

#include "kernel/backward.h"
#include "kernel/cells/all.h"
#include "kernel/forward.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
constexpr KernelsFor<Storage> kernels_for() {
  using Panels = typename ForwardPanels<Cell, Storage>::Prepared;
  return {{&Panels::bytes, &pack_all<Panels, Storage>, &unpack_all<Panels, Storage>},
          &forward<Cell, Storage>,
          {&backward_bytes<Cell, Storage>, &pack_backward<Cell, Storage>, nullptr},
          &backward<Cell, FloatProducts<Cell, Storage>>,
          &add_biases<Cell, Storage>,
          {1, 1}};
}

template <class Cell>
constexpr KernelsOfCell kernels_of_cell() {
  return {kernels_for<Cell, float>(),
          kernels_for<Cell, double>(),
          kernels_for<Cell, BFloat16>(),
          kernels_for<Cell, Half>(),
          Cell::name,
          Cell::weight_blocks,
          Cell::kept,
          Cell::states,
          Cell::one_bias_gradient,
          Cell::activations,
          Cell::can_project,
          Cell::has_rate};
}

template <class... Cells>
constexpr Kernels kernels_of_cells(CellList<Cells...>, const char* name, const Int8Kernels& int8) {
  return {{kernels_of_cell<Cells>()...}, name, name, Shape<float>::panel_width, &int8, {}, {}};
}

// Returns the kernels of the instruction set `name`, whose kernels for 8-bit weights are `int8`
// unless the processor has faster ones.
constexpr Kernels kernels_named(const char* name, const Int8Kernels& int8) {
  return kernels_of_cells(AllCells(), name, int8);
}

}  // namespace
}  // namespace namernn_fast
