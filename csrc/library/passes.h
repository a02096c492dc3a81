// The forward and the backward pass of a checked stack, on the kernels of this processor.
#pragma once

#include <optional>
#include <vector>

#include "library/stack.h"

namespace namernn_fast {

struct ForwardTensors {
  Tensor h_n;
  std::vector<std::optional<Tensor>> outputs;  // of each layer; of those not kept, none
};

// Computes a whole stack. The outputs of layers before the last are kept where they are wanted,
// that of the last layer unless the last state alone is.
ForwardTensors forward_stack(const Stack& stack, const Options& options);

struct BackwardTensors {
  std::vector<Tensor> outputs;  // of each layer, from the forward pass
  std::optional<Tensor> grad_output;
  std::optional<Tensor> grad_h_n;
  std::optional<Tensor> grad_input;
  std::optional<Tensor> grad_hx;
  std::vector<Tensor> grad_weights;  // as in Stack; of layers not wanted, empty ones
  std::vector<bool> want_weights;    // of each layer
};

// Fills the gradients, whose tensors are wanted where they are present.
void backward_stack(const Stack& stack, const Options& options, BackwardTensors& grads);

}  // namespace namernn_fast
