// The kernel table of one instruction set, for the files in csrc/isa/.
#pragma once

#include "kernel/backward.h"
#include "kernel/cells/elman.h"
#include "kernel/forward_copied.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
constexpr KernelsFor<Storage> kernels_for(void (*forward)(const Forward<Storage>&,
                                                          const Runtime&)) {
  using Panels = ForwardPanels<Cell, Storage>;
  return {{&Panels::bytes, &pack_all<Panels, Storage>},
          forward,
          {&backward_bytes<Cell, Storage>, &pack_backward<Cell, Storage>},
          &backward<Cell, FloatProducts<Storage>>,
          &add_biases<Storage>,
          1};
}

constexpr Kernels kernels_named(const char* name) {
  return {kernels_for<Elman, float>(&forward<Elman, float>),
          kernels_for<Elman, double>(&forward<Elman, double>),
          kernels_for<Elman, BFloat16>(&forward_copied<Elman, BFloat16>),
          kernels_for<Elman, Half>(&forward_copied<Elman, Half>),
          name,
          name,
          Shape<float>::panel_width};
}

}  // namespace
}  // namespace namernn_fast
