// The kernel table of one instruction set, for the files in csrc/isa/.
#pragma once

#include "kernel/backward.h"
#include "kernel/cells/elman.h"
#include "kernel/cells/gru.h"
#include "kernel/cells/lstm.h"
#include "kernel/forward.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
constexpr KernelsFor<Storage> kernels_for() {
  using Panels = ForwardPanels<Cell, Storage>;
  return {{&Panels::bytes, &pack_all<Panels, Storage>},
          &forward<Cell, Storage>,
          {&backward_bytes<Cell, Storage>, &pack_backward<Cell, Storage>},
          &backward<Cell, FloatProducts<Cell, Storage>>,
          &add_biases<Cell, Storage>,
          1};
}

template <class Cell>
constexpr KernelsOfCell kernels_of_cell() {
  return {kernels_for<Cell, float>(), kernels_for<Cell, double>(), kernels_for<Cell, BFloat16>(),
          kernels_for<Cell, Half>(),  Cell::weight_blocks,         Cell::kept,
          Cell::one_bias_gradient,    Cell::has_cell_state};
}

constexpr Kernels kernels_named(const char* name) {
  return {kernels_of_cell<Elman>(), kernels_of_cell<Gru>(), kernels_of_cell<Lstm>(), name, name,
          Shape<float>::panel_width};
}

}  // namespace
}  // namespace namernn_fast
