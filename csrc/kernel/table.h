// The kernel table of one instruction set, for the files in csrc/isa/.
#pragma once

#include "kernel/backward.h"
#include "kernel/forward_copied.h"

namespace namernn_fast {
namespace {

template <class Storage>
constexpr KernelsFor<Storage> kernels_for(void (*forward)(const Forward<Storage>&,
                                                          const Runtime&)) {
  return {{&ForwardPanels<Storage>::bytes, &pack_all<ForwardPanels<Storage>, Storage>},
          forward,
          {&backward_bytes<Storage>, &pack_backward<Storage>},
          &backward<FloatProducts<Storage>>,
          &add_biases<Storage>,
          1};
}

constexpr Kernels kernels_named(const char* name) {
  return {kernels_for<float>(&forward<float>),
          kernels_for<double>(&forward<double>),
          kernels_for<BFloat16>(&forward_copied<BFloat16>),
          kernels_for<Half>(&forward_copied<Half>),
          name,
          name,
          Shape<float>::panel_width};
}

}  // namespace
}  // namespace namernn_fast
