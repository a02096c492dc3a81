// The entry point of the forward pass, and when each of its four time loops runs. forward() chooses
// among the first three, each in a file of its name; the fourth is another entry point.
// - forward_short: one sequence of few steps through a small layer, in float or double; computes
//   both products together and reads the weights where the caller stores them. See is_short();
// - forward_rows: other calls in float and double with an output and without `origin`; goes step by
//   step through the caller's rows;
// - forward_copied: all calls that are left: 16-bit types, rows in another order (`origin`), and
//   calls without an output. Runs the loop of forward_rows on copies of the rows, one time block at
//   a time;
// - forward_pairs (bfloat16_forward.h): bfloat16 on processors that multiply pairs of it. Their
//   kernel table has this function instead of forward(). If all weights are read in place, it calls
//   forward() of the kernels that convert to float.
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
