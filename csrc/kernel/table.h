// The kernel table of one instruction set, for the files in csrc/isa/.
#pragma once

#include "kernel/backward.h"
#include "kernel/cells/elman.h"
#include "kernel/forward.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
constexpr KernelsFor<Storage> kernels_for() {
  using Panels = ForwardPanels<Cell, Storage>;
  return {{&Panels::bytes, &pack_all<Panels, Storage>},
          &forward<Cell, Storage>,
          {&backward_bytes<Cell, Storage>, &pack_backward<Cell, Storage>},
          &backward<Cell, FloatProducts<Storage>>,
          &add_biases<Storage>,
          1};
}

constexpr Kernels kernels_named(const char* name) {
  return {kernels_for<Elman, float>(),
          kernels_for<Elman, double>(),
          kernels_for<Elman, BFloat16>(),
          kernels_for<Elman, Half>(),
          name,
          name,
          Shape<float>::panel_width};
}

}  // namespace
}  // namespace namernn_fast
