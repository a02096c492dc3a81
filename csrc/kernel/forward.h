// The entry of the forward pass, which chooses its time loop. There are four, each in a file of the
// same name:
// - forward_short: one sequence of few steps through a small layer, in float or double, both
//   products at once with the weights where the caller stores them (see is_short());
// - forward_rows: float and double otherwise, one step after the other on the rows that the caller
//   stores;
// - forward_copied: 16-bit types, rows in any order (`origin`), and calls that want no output:
//   the loop of forward_rows on copies of the rows of one time block after the other;
// - forward_pairs (bfloat16_forward.h): bfloat16 on processors that multiply pairs of it. Their
//   kernel table has it in place of forward(); it leaves calls that read weights in place to
//   forward_copied.
#pragma once

#include "kernel/forward_copied.h"
#include "kernel/forward_rows.h"
#include "kernel/forward_short.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
void forward(const Forward<Storage>& args, const Runtime& runtime) {
  if constexpr (std::is_same_v<Storage, Compute<Storage>>) {
    if (is_short(args.layer)) return forward_short<Cell>(args, runtime);
    if (!args.layer.layout.origin && args.output.data) return forward_rows<Cell>(args, runtime);
  }
  forward_copied<Cell>(args, runtime);
}

}  // namespace
}  // namespace namernn_fast
