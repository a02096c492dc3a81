// The forward and backward passes of a stack over prefix trees, in float and double.
#pragma once

#include "library/passes/passes.h"
#include "library/passes/prefixes.h"

namespace namernn_fast {

// Returns the trees of a call with share_prefixes. Returns nullopt without share_prefixes, or if
// the trees are not estimated to save time.
std::optional<PrefixTrees> trees_of(const Stack& stack, const Options& options);

// Computes the last states of all layers. results.outputs must be present for every layer or for
// none; if present, they receive the states of all rows, tree after tree.
void forward_trees(const Stack& stack, const PrefixTrees& trees, ForwardTensors& results);

// Fills the gradients in `grads`, given the outputs from forward_trees(). grads.grad_output must be
// absent.
void backward_trees(const Stack& stack, const PrefixTrees& trees, const BackwardTensors& grads);

}  // namespace namernn_fast
