// The forward and backward passes of a checked stack, run by this processor's kernels.
#pragma once

#include <optional>
#include <vector>

#include "library/arguments/stack.h"

namespace namernn_fast {

struct ForwardTensors {
  std::vector<Tensor> last_states;             // one per state of the cell
  std::vector<std::optional<Tensor>> outputs;  // one per layer; absent if not needed
  std::vector<Tensor> kept;                    // one per layer; empty if nothing is kept
};

// Runs the forward pass of all layers. Returns the output of the last layer unless `last_state` is
// set, and the outputs of the other layers if `want_saved` is set.
ForwardTensors forward_stack(const Stack& stack, const Options& options);

struct BackwardTensors {
  std::vector<Tensor> outputs;  // one per layer, from the forward pass
  std::vector<Tensor> kept;     // one per layer; empty if the cell keeps nothing
  std::optional<Tensor> grad_output;
  std::vector<std::optional<Tensor>> grad_last_states;  // one per state of the cell
  std::optional<Tensor> grad_input;
  std::vector<Tensor> grad_states;    // empty, or one per state of the cell
  std::vector<Tensor> grad_reset_to;  // the same; initially zeros
  // One for each of Stack::inputs, with Stack::all_features_beside() features.
  std::vector<std::optional<Tensor>> grad_inputs;
  std::vector<Tensor> grad_weights;  // indexed like Stack::weights; empty if not requested
  std::vector<bool> want_weights;    // one per layer
};

// Runs the backward pass of all layers, and fills the gradient tensors that are present.
void backward_stack(const Stack& stack, const Options& options, BackwardTensors& grads);

}  // namespace namernn_fast
