// Steps of a step module, whose caller holds the states: one layer, from its own weights or
// prepared.
#pragma once

#include "contract.h"
#include "library/options.h"
#include "library/tensors.h"

namespace namernn_fast {

// The arguments of a step of a step module.
struct CellStep {
  CellKind cell;
  View input;                 // [n, D]
  View initial[kMostStates];  // [n, H] each
  View last[kMostStates];     // [n, H] each, written
  View weights[4];            // weight_ih, weight_hh and, with biases, bias_ih and bias_hh; or the
                              // tensor from prepare()
  int64_t initial_count;      // number of initial states; 0 for zeros
  int64_t last_count;
  int64_t weight_count;
};

// Runs a step of a step module, and returns true; or does nothing, and returns false, if the
// arguments do not match or cannot be read where they are.
bool run_cell_step(const CellStep& step, const Options& options);

}  // namespace namernn_fast
