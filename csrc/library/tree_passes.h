// The forward and the backward pass of a stack over prefix trees, in float and double.
#pragma once

#include "library/passes.h"
#include "library/prefixes.h"

namespace namernn_fast {

// The trees of a call that shares prefixes, if they are worth having.
std::optional<PrefixTrees> trees_of(const Stack& stack, const Options& options);

// Computes h_n of a whole stack. Where `outputs` are present, of every layer, they receive the
// states of all rows of the trees, tree after tree; else no state is kept but those of h_n.
void forward_trees(const Stack& stack, const PrefixTrees& trees, ForwardTensors& results);

// Fills the gradients, from outputs that forward_trees() has filled. grad_output must be absent.
void backward_trees(const Stack& stack, const PrefixTrees& trees, const BackwardTensors& grads);

}  // namespace namernn_fast
