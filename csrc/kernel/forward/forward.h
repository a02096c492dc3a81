// Entry point of the forward pass. There are four time loops, each in the file of the same name.
// forward() chooses one of the first three; the fourth is a separate entry point.
// - forward_short: for one short sequence through a small layer, in float or double. Computes
//   projection and recurrence together and reads the caller's weights in place;
// - forward_rows: for other calls in float or double that want an output and have no `origin`.
//   Computes the caller's rows step by step;
// - forward_copied: for all remaining calls: 16-bit types, rows in another order (`origin`), or no
//   output. Runs the loop of forward_rows on copies of the rows, one time block at a time;
// - forward_encoded: for rows that the products read as bfloat16 terms or as 8-bit integers. Kernel
//   tables for such products point to a function that calls forward_encoded() instead of forward().
#pragma once

#include "kernel/forward/forward_copied.h"
#include "kernel/forward/forward_rows.h"
#include "kernel/forward/forward_short.h"

namespace namernn_fast {
namespace {

template <class Storage>
void forward(const Forward<Storage>& args, const Runtime& runtime) {
  if constexpr (std::is_same_v<Storage, Compute<Storage>>) {
    if (is_short(args.layer)) return forward_short(args, runtime);
    if (!args.layer.layout.origin && args.output.data) return forward_rows(args, runtime);
  }
  forward_copied(args, runtime);
}

}  // namespace
}  // namespace namernn_fast
