// Defines the kernel table of an instruction set for layers with 8-bit weights.
#pragma once

#include "kernel/forward/forward_encoded.h"
#include "kernel/weights/int8_panels.h"

namespace namernn_fast {
namespace {

template <class Encoding>
void forward_int8(const Forward<float>& args, const Runtime& runtime) {
  forward_encoded<Encoding>(args, args.layer.panels, runtime);
}

// Returns the kernels that multiply with Tile. `name` names Tile's instruction set.
template <class Tile>
constexpr Int8Kernels int8_kernels(const char* name) {
  using Panels = Int8Panels<float>;
  KernelsFor<float> kernels{};
  kernels.forward_panels = {&Panels::bytes, &pack_all<Panels, float>, &unpack_all<Panels, float>};
  kernels.forward = &forward_int8<AsInt8<Tile>>;
  return {kernels, name};
}

}  // namespace
}  // namespace namernn_fast
