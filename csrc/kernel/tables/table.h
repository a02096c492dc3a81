// Defines the kernel table of one instruction set. The files in csrc/isa/ include this header.
#pragma once

#include "cells/all.h"
#include "kernel/backward/backward.h"
#include "kernel/forward/forward.h"

namespace namernn_fast {
namespace {

// With 8 floats per vector and 16 registers, products in place run at less than half the rate of
// products with panels, which soon makes up for the cost of packing.
#if defined(__AVX2__) && NAMERNN_REGISTERS == 16
constexpr PanelGains kPanelGains = {{2, 16}, {3, 12}};
#else
constexpr PanelGains kPanelGains = {{1, INT64_MAX}, {1, INT64_MAX}};
#endif

template <class Storage>
constexpr KernelsFor<Storage> kernels_for() {
  using Panels = typename ForwardPanels<Storage>::Prepared;
  return {{&Panels::bytes, &pack_all<Panels, Storage>, &unpack_all<Panels, Storage>},
          &forward<Storage>,
          {&backward_bytes<Storage>, &pack_backward<Storage>, nullptr},
          &backward<FloatProducts<Storage>>,
          &add_biases<Storage>,
          kPanelGains};
}

// Returns the kernels of the instruction set `name`. `int8` holds its kernels for 8-bit weights;
// processor.cpp replaces `int8` if the processor has faster kernels for 8-bit weights.
constexpr Kernels kernels_named(const char* name, const Int8Kernels& int8) {
  Kernels kernels{};
  static_cast<KernelsFor<float>&>(kernels) = kernels_for<float>();
  static_cast<KernelsFor<double>&>(kernels) = kernels_for<double>();
  static_cast<KernelsFor<BFloat16>&>(kernels) = kernels_for<BFloat16>();
  static_cast<KernelsFor<Half>&>(kernels) = kernels_for<Half>();
  AllCells::add_to(kernels);
  kernels.equation = with_code<Equation>({});
  kernels.name = kernels.bfloat16_name = name;
  kernels.panel_width = Shape<float>::panel_width;
  kernels.int8 = &int8;
  return kernels;
}

}  // namespace
}  // namespace namernn_fast
