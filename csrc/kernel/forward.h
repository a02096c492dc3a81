// The entry point of the forward pass. The pass has four time loops: forward() chooses among the
// first three, each in the file of the same name; the fourth is a separate entry point.
// - forward_short: for one short sequence through a small layer, in float or double. Computes both
//   products together and reads the weights where the caller stores them. See is_short();
// - forward_rows: for other calls in float and double with an output and without `origin`. Goes
//   step by step through the caller's rows;
// - forward_copied: for all remaining calls: 16-bit types, rows in another order (`origin`), and
//   calls without an output. Runs the loop of forward_rows on copies of the rows, one time block at
//   a time;
// - forward_pairs (bfloat16_forward.h): for bfloat16 on processors with instructions that multiply
//   pairs of it. Their kernel table has this function instead of forward(). If all weights are read
//   in place, it calls forward() of the kernels that convert to float.
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
