// A step runs a stack in one direction on one frame, for streams and step modules. Its weights are
// prepared, or belong to a single layer.
#pragma once

#include "contract.h"
#include "library/arguments/options.h"
#include "library/base/tensors.h"

namespace namernn_fast {

// The arguments of a step, which are not checked yet.
struct Step {
  const Cell* cell;           // not read if the weights are prepared
  View weights[kParameters];  // the tensor from prepare(), or the parameters of a layer
  int64_t weight_count;
  View states[kMostStates];  // stream: [layers, sequences, P] and [layers, sequences, H], in
                             // float for layers in 16 bits; step module: [sequences, H] each
  int64_t state_count;       // 0 if the states are zeros
  View last[kMostStates];    // like `states`, contiguous, written; may be `states`
  int64_t last_count;
  View frame;  // [n, D]; in a stream also several steps: [T, n, D], or [n, T, D] with BATCH_FIRST.
               // Token ids lack the last dimension.
  View inputs[kMostInputs];  // beside x, shaped like `frame` with H features for each layer;
                             // without data if absent
  View output;  // written, only in a stream: shaped like `frame`, with P features, contiguous
  bool is_of_stream;
  const int64_t* rows;  // [row_count]: the sequences that the frame is for
  int64_t row_count;    // -1 if the frame is for all sequences
};

// Returns whether the rows of a step can be read and written in place and, for a stream, whether
// the output has as many dimensions as the frame.
bool is_simple(const Step& step);

// Runs a step. Checks all arguments first and writes the last states last, so that an error leaves
// the states unchanged.
void run_step(const Step& step, const Options& options);

}  // namespace namernn_fast
