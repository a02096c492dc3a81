// A step runs a unidirectional stack on one frame, for streams and step modules. The weights are
// prepared, or they are the parameters of a single layer. A step module can also run backward.
#pragma once

#include "contract.h"
#include "library/arguments/options.h"
#include "library/base/tensors.h"

namespace namernn_fast {

// The unchecked arguments of a step.
struct Step {
  const Cell* cell;
  View weights[kParameters];  // the tensor from prepare(), or the parameters of a layer
  int64_t weight_count;
  // In a stream, [layers, sequences, P] and [layers, sequences, H]; float for 16-bit layers. In a
  // step module, [sequences, H].
  View states[kMostStates];
  int64_t state_count;     // 0 if the states are zeros
  View last[kMostStates];  // written: the last states, contiguous; may alias `states`
  int64_t last_count;
  // [n, D]. A stream also takes several steps: [T, n, D], or [n, T, D] with BATCH_FIRST. Frames of
  // token ids lack the last dimension.
  View frame;
  View inputs[kMostInputs];  // besides x; like `frame`, with layers * H features; no data if absent
  View output;  // written in a stream: contiguous, shaped like `frame` but with P features
  // Written in a step module, unless there is no data: what run_step_back() reads, [sequences,
  // (1 + kept) * H]. h and the values that the cell keeps.
  View saved;
  bool is_of_stream;
  const int64_t* rows;  // [row_count]: indices of the sequences in the frame
  int64_t row_count;    // -1 if the frame has all sequences
};

// The unchecked arguments of a step of a step module that runs backward. Views without data are
// absent: gradients that are zero, or not wanted.
struct StepBack {
  const Cell* cell;
  View weights[kParameters];  // prepared for the backward pass, or the parameters of a layer
  int64_t weight_count;
  View states[kMostStates];
  int64_t state_count;  // 0 if the states are zeros
  View frame;
  View inputs[kMostInputs];
  View saved;
  View grad_last[kMostStates];  // of any strides
  // Written, contiguous: the gradients of the arguments above. With prepared weights, `grad_sums`
  // [sequences, Cell::sums * H] replaces the gradients of matrices and biases.
  View grad_frame;
  View grad_states[kMostStates];  // all or none
  View grad_inputs[kMostInputs];
  View grad_sums;
  View grad_weights[kParameters];  // in the order of `weights`
};

// Returns whether a step can use its tensors in place: their features are contiguous, and a
// stream's output overlaps no input, is contiguous and has as many dimensions as the frame.
bool is_simple(const Step& step);

// Runs a step. Checks all arguments first and writes the new states at the end, so that an error
// leaves the states unchanged.
void run_step(const Step& step, const Options& options);

// Returns whether a backward step can use its tensors in place.
bool is_simple(const StepBack& step);

// Runs a step backward. Checks all arguments first.
void run_step_back(const StepBack& step, const Options& options);

}  // namespace namernn_fast
