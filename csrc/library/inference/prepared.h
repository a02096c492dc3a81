// Prepared layers: the weights of a stack, packed into a single tensor once for many calls. The
// weights are in the order in which this processor's kernels read them.
//
// The tensor has the dtype of the layers, or int8. A header records the instruction set, the cell
// and the sizes. For each direction of each layer, the panels of the forward or of the backward
// pass and the vectors (such as biases) follow. If the input is token ids, the first layer also has
// its table.
#pragma once

#include <vector>

#include "library/arguments/stack.h"

namespace namernn_fast {

// Packs the weights of a stack from check_layers() into a new tensor.
Tensor prepare(const Stack& stack);

// Packs a stack's weights into a tensor from prepare(). No concurrent call may read this tensor.
void refresh(const Stack& stack, const Tensor& prepared);

// Returns the weights that `stack.prepared` was made from, with an empty tensor for each table.
std::vector<Tensor> unpack(const Stack& stack);

// Returns the dtype of the original weights, given the dtype of the prepared tensor.
int32_t dtype_of_weights(int32_t prepared, const Options& options);

// Sets the weights of a stack to a tensor from prepare(). Checks that the tensor is for the layers
// of the stack and for this processor.
void set_prepared(Stack& stack, const Tensor& prepared);

// Returns a Stack for the layers in a tensor from prepare(), with its batch unset. The caller must
// keep the cell and the tensor alive.
Stack stack_of_prepared(const Cell& cell, const View& prepared, const Options& options);

}  // namespace namernn_fast
