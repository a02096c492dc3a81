// The entry point of the forward pass, which has four time loops. forward() chooses one of the
// first three, each in the file of the same name. The fourth loop is a separate entry point.
// - forward_short: for one short sequence through a small layer, in float or double. Computes
//   projection and recurrence together and reads the weights where the caller stores them;
// - forward_rows: for other calls in float or double that want an output and have no `origin`.
//   Computes the caller's rows step by step;
// - forward_copied: for all remaining calls, which use a 16-bit type, have rows in another order
//   (`origin`), or want no output. Runs the loop of forward_rows on copies of the rows, one time
//   block at a time;
// - forward_encoded: for rows that the products read as bfloat16 terms or as 8-bit integers. The
//   kernel tables of such products list a function that calls it, instead of forward().
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
