// The kernel table for bfloat16 on instructions that multiply pairs, for the files in csrc/isa/
// that define a PairTile.
#pragma once

#include "kernel/bfloat16_backward.h"
#include "kernel/bfloat16_forward.h"
#include "kernel/cells/elman.h"

namespace namernn_fast {
namespace {

// There are no functions for panels and tables that outlive a call: only waves and trees need them,
// and these do not run in bfloat16.
constexpr KernelsFor<BFloat16> kernels_on_pairs() {
  return {{nullptr, nullptr},
          &forward_pairs<Elman>,
          {nullptr, nullptr},
          &backward<Elman, PairProducts<Elman>>,
          nullptr,
          8};
}

}  // namespace
}  // namespace namernn_fast
