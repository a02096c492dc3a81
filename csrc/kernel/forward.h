// The entry of the forward pass, which chooses its time loop. There are four, each in a file of the
// same name:
// - forward_short: one sequence of few steps through a small layer, in float or double; computes
//   both products together and reads the weights where the caller stores them (see is_short());
// - forward_rows: all other calls in float and double, step by step on the caller's rows;
// - forward_copied: 16-bit types, rows in any order (`origin`), and calls without an output; runs
//   the loop of forward_rows on copies of the rows, one time block at a time;
// - forward_pairs (bfloat16_forward.h): bfloat16 on processors that multiply pairs of it. Their
//   kernel table has this function instead of forward(); calls that read all weights in place go on
//   to forward_copied.
#pragma once

#include "kernel/forward_copied.h"
#include "kernel/forward_rows.h"
#include "kernel/forward_short.h"

namespace namernn_fast {
namespace {

template <class Cell, class Storage>
void forward(const Forward<Storage>& args, const Runtime& runtime) {
  if constexpr (std::is_same_v<Storage, Compute<Storage>>) {
    if constexpr (Cell::sums_in_output) {
      if (is_short(args.layer)) return forward_short<Cell>(args, runtime);
    }
    if (!args.layer.layout.origin && args.output.data) return forward_rows<Cell>(args, runtime);
  }
  forward_copied<Cell>(args, runtime);
}

}  // namespace
}  // namespace namernn_fast
