// Checks the arguments of a call, and builds the kernel arguments for each layer and direction.
#pragma once

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "contract.h"
#include "library/arguments/batch.h"
#include "library/arguments/parameters.h"
#include "library/base/tensors.h"
#include "plan.h"
#include "processor.h"
#include "rows.h"

namespace namernn_fast {

// The sizes of a stack of layers.
struct Sizes {
  int64_t layers;
  // Features in `input`, 0 for token ids or given sums; later layers read directions * P features.
  int64_t D;
  int64_t H;
  int64_t V;      // vocabulary size, the number of rows of the token table; 0 if there is none
  int64_t P;      // size of h: less than H with projections, otherwise H
  int64_t heads;  // number of blocks on the diagonal of weight_hh
};

// The checked arguments of a call that runs a stack of layers on one batch.
struct Stack {
  Batch batch;
  bool has_ids;  // whether the input holds token ids instead of features
  Tensor input;
  std::vector<Tensor> states = {};    // initial states, one per state of the cell; empty for zeros
  std::vector<Tensor> reset_to = {};  // states after resets [T, layers, B, P or H]; empty for zeros
  // Inputs besides x, shaped like `input`, with the features of one layer and direction after the
  // other, or with the features that all layers and directions share.
  std::vector<Tensor> inputs = {};
  std::vector<Tensor> weights = {};  // empty in a prepared stack and in a step
  const char* prepared = nullptr;    // weights packed by prepare(), or null; see prepared.h
  int64_t layers = 0;
  int64_t directions = 0;
  ParameterList parameters = {};  // the parameters of each direction
  int64_t D = 0;                  // as in Sizes
  int64_t V = 0;                  // vocabulary size, the number of rows of the token table
  int64_t H = 0;
  int64_t P = 0;
  int64_t heads = 1;
  bool sums_given = false;  // whether `input` holds W_ih x of each direction
  int32_t dtype = 0;        // dtype of inputs, states and outputs
  const Cell* cell = nullptr;
  std::shared_ptr<const Cell> owned_cell = {};  // keeps the cell of an equation alive
  Activation activation = Activation::tanh;
  bool batch_invariant = false;
  bool int8 = false;             // whether the prepared weights are 8-bit integers
  bool backward_panels = false;  // whether the weights are prepared for the backward pass
  int64_t terms = 0;  // number of bfloat16 terms that products split each float into, or 0

  // Returns the index of (layer, direction) in the state tensors and in the order of `weights`.
  int64_t state_of(int64_t layer, int64_t direction) const {
    return layer * directions + direction;
  }
  // Returns the index of a direction's first weight in `weights`.
  size_t first_weight(int64_t state) const { return size_t(state * parameters.count); }
  int64_t input_size(int64_t layer) const { return layer ? directions * P : D; }
  // Returns the number of features in a row of `input`.
  int64_t input_features() const { return sums_given ? directions * gate_rows() : D; }
  // Returns the number of rows of weight_ih and weight_hh, which is the length of each bias too.
  int64_t gate_rows() const { return cell->gates * H; }
  // Returns the number of states of the cell.
  size_t state_count() const { return size_t(cell->states); }
  // Returns the number of elements per sequence of the i-th state.
  int64_t size_of_state(size_t i) const { return i == 0 ? P : H; }
  // Returns the shape of the i-th initial or last state.
  std::vector<int64_t> state_shape(size_t i) const {
    return {layers * directions, batch.B, size_of_state(i)};
  }
  bool has_projections() const { return P < H; }
  // Returns whether only float kernels can compute the layers. Kernels for encoded rows neither
  // project h nor take heads or sums, and pack their weights anew in each backward pass.
  bool needs_floats() const {
    return has_projections() || heads > 1 || sums_given || backward_panels ||
           namernn_fast::needs_floats(*cell);
  }
  // Returns the shape of a parameter of a layer. With token ids, weight_ih of the first layer is a
  // table.
  std::vector<int64_t> shape_of(Parameter parameter, int64_t layer) const {
    if (parameter == kWeightHh) return {gate_rows(), recurrent_size(*cell, H, P, heads)};
    if (parameter == kWeightHr) return {P, H};
    if (parameter >= kOwn) {
      const int64_t blocks = cell->own_blocks[parameter - kOwn];
      return blocks == 1 ? std::vector<int64_t>{H} : std::vector<int64_t>{blocks, H};
    }
    if (parameter != kWeightIh) return {gate_rows()};
    if (layer == 0 && has_ids) return {V, gate_rows()};
    return {gate_rows(), input_size(layer)};
  }
  // Returns the number of features of the i-th input besides x for one layer and direction.
  int64_t features_beside(size_t i) const {
    return namernn_fast::features_beside(*cell, int64_t(i), H);
  }
  // Returns the number of features of the i-th input besides x, unless its features are shared.
  int64_t all_features_beside(size_t i) const { return layers * directions * features_beside(i); }
  // Returns whether all layers and directions share the features of the i-th input besides x, given
  // that it has `width` features.
  bool is_shared(size_t i, int64_t width) const { return width == features_beside(i); }
  // Returns the number of features that the i-th input besides x must have, given that it has
  // `width` features.
  int64_t checked_width(size_t i, int64_t width) const {
    return is_shared(i, width) ? width : all_features_beside(i);
  }
  // Returns the first feature of that input that a layer and direction reads.
  int64_t column_beside(size_t i, int64_t width, int64_t state) const {
    return is_shared(i, width) ? 0 : state * features_beside(i);
  }
  // Returns whether the batch has no rows or the layers have no hidden units. Kernels must not be
  // called for an empty stack.
  bool is_empty() const { return batch.layout.N == 0 || H == 0; }
  // Returns the number of values per row that a direction keeps for the backward pass besides its
  // output.
  int64_t kept_size() const { return cell->kept * H; }
  // Returns whether the cell keeps values for the backward pass besides its output.
  bool keeps() const { return cell->kept > 0; }
};

using Tensors = std::vector<Tensor>;
using TensorRange = torch::headeronly::HeaderOnlyArrayRef<Tensor>;  // consecutive tensors

// The lists that an operator's argument `tensors` concatenates; see namernn_fast/ops.py.
struct Lists {
  TensorRange states;
  TensorRange reset_to;
  TensorRange inputs;
  TensorRange weights;  // or only the prepared tensor
};

// Splits an operator's argument `tensors` into its lists, according to the options.
Lists split(const Cell& cell, const Tensors& tensors, const Options& options);

// Checks the arguments of an operator and returns them as a Stack. Error messages name the
// argument, the expected value and the actual value.
Stack check_stack(const Cell& cell, const Tensor& input, TensorRange states, TensorRange weights,
                  Batch batch, const Options& options);

// Like check_stack(), for prepared layers of this dtype and these sizes. The caller sets their
// weights with set_prepared().
Stack check_prepared_stack(const Cell& cell, const Tensor& input, TensorRange states, int32_t dtype,
                           const Sizes& sizes, Batch batch, const Options& options);

// Checks and sets the states that sequences restart from at resets.
void set_reset_to(Stack& stack, TensorRange reset_to, bool has_reset);

// Checks and sets the inputs besides x.
void set_inputs(Stack& stack, TensorRange inputs);

// Returns a Stack with its batch and weights unset, for prepare() and unpack().
Stack check_layers(const Cell& cell, const Sizes& sizes, int32_t dtype, const Options& options);

// Checks and sets the weights of a stack.
void set_weights(Stack& stack, TensorRange weights);

// Returns the number of bfloat16 terms that a call's products split each float into; 0 if products
// use floats.
int64_t terms_of(const SequenceLayout& layout, int64_t H, const Options& options);

// Sets the batch of a stack from check_layers() to B sequences of T steps, and sets the fields that
// depend on the batch.
void set_rows(Stack& stack, int64_t T, int64_t B, const Options& options);

// Returns the size of a tensor's last dimension; 0 without dimensions.
inline int64_t last_size(const Tensor& tensor) {
  return tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 0;
}

// Returns whether a layer of the cell with H hidden units may have this many heads.
inline bool can_have_heads(const Cell& cell, int64_t H, int64_t heads) {
  return heads == 1 || (cell.can_have_heads && heads > 0 && H % heads == 0);
}

// Returns the number of heads of a layer with H hidden units and a weight_hh of this width; 1 if
// the width is wrong.
inline int64_t heads_of(const Cell& cell, int64_t H, int64_t width) {
  const bool has_heads = cell.has_weight_hh && cell.can_have_heads && width > 0 && H % width == 0;
  return has_heads ? H / width : 1;
}

// Returns this processor's kernels for tensors of type Scalar.
template <class Scalar>
const KernelsFor<Scalar>& kernels_in() {
  return kernels();
}

// Returns the kernels that read the panels of a prepared stack.
template <class Scalar>
const KernelsFor<Scalar>& prepared_kernels(const Stack& stack) {
  if constexpr (std::is_same_v<Scalar, float>) {
    if (stack.int8) return kernels().int8->kernels;
  }
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    const KernelsFor<BFloat16>* pairs = kernels().bfloat16_on_pairs;
    if (pairs && !stack.needs_floats()) return *pairs;
  }
  return kernels_in<Scalar>();
}

// Returns the kernels for running the layers of a stack one after the other.
template <class Scalar>
const KernelsFor<Scalar>& kernels_for(const Stack& stack) {
  if constexpr (std::is_same_v<Scalar, float>) {
    if (stack.terms > 0) return kernels().float_on_pairs[stack.terms - 1];
  }
  return prepared_kernels<Scalar>(stack);
}

// Byte offsets of one direction's weights in a prepared tensor.
struct PreparedParts {
  int64_t panels;
  int64_t vectors[kParameters];  // offsets of the biases and of the cell's own parameters
  int64_t table;
  int64_t end;
};

// Returns the weight offsets of direction d of layer k. Defined in prepared.cpp.
PreparedParts parts_of(const Stack& stack, int64_t k, int64_t d);

// Makes `layer` use the weights in `stack.prepared` for layer k and direction d.
template <class Scalar>
void set_prepared_weights(const Stack& stack, int64_t k, int64_t d, Layer<Scalar>& layer) {
  const PreparedParts parts = parts_of(stack, k, d);
  const char* data = stack.prepared;
  layer.panels = data + parts.panels;
  for (const Parameter p : stack.parameters) {
    if (is_vector(p))
      layer.parameters[p] = reinterpret_cast<const Scalar*>(data + parts.vectors[p]);
  }
  if (k == 0 && stack.has_ids) {
    const KernelsFor<Scalar>& kernels = prepared_kernels<Scalar>(stack);
    layer.table.V = stack.V;
    layer.table.rows = reinterpret_cast<const Scalar*>(data + parts.table);
    if (kernels.add_biases) layer.table.biased = layer.table.rows;
  }
}

// Returns the restart states of one layer. `tensor` has the shape [T, layers, B, P or H] and starts
// at `data`; `state` is the layer's index in the state tensors.
template <class Scalar>
RestartStates<Scalar> restart_states(const Tensor& tensor, Scalar* data, int64_t state) {
  return {data + state * tensor.stride(1), tensor.stride(0), tensor.stride(2)};
}

// Returns a kernel's arguments for direction d of layer k, except the input.
template <class Scalar>
Layer<Scalar> layer_of(const Stack& stack, int64_t k, int64_t d) {
  const int64_t state = stack.state_of(k, d);
  Layer<Scalar> layer{};
  layer.cell = stack.cell;
  layer.layout = stack.batch.layout;
  layer.D = stack.input_size(k);
  layer.H = stack.H;
  layer.P = stack.P;
  layer.heads = stack.heads;
  layer.sums_given = stack.sums_given;
  layer.reverse = d == 1;
  layer.activation = stack.activation;
  layer.resets = stack.batch.resets;
  layer.batch_invariant = stack.batch_invariant;
  layer.chains =
      stack.batch_invariant ? Chains{kChain, kChain} : choose_chains(stack.batch.layout, stack.H);
  // Prepared weights are already in panels, but products of bfloat16 terms must convert the panels.
  // For few rows, converting does not pay off, so in_place makes pair kernels call float kernels.
  if (!stack.batch_invariant && (!stack.prepared || stack.terms > 0)) {
    layer.in_place = choose_in_place(stack.batch.layout, layer.D, recurrent_size(layer),
                                     kernels_for<Scalar>(stack).panel_gains);
  }
  for (size_t i = 0; i < stack.states.size(); ++i) {
    const Tensor& initial = stack.states[i];
    layer.initial[i] = {const_data<Scalar>(initial) + state * initial.stride(0), initial.stride(1)};
  }
  for (size_t i = 0; i < stack.reset_to.size(); ++i) {
    layer.reset_to[i] = restart_states<const Scalar>(stack.reset_to[i],
                                                     const_data<Scalar>(stack.reset_to[i]), state);
  }
  if (stack.prepared) {
    set_prepared_weights(stack, k, d, layer);
    return layer;
  }
  if (stack.weights.empty()) return layer;  // the caller sets the weights
  const Tensor* weight = &stack.weights[stack.first_weight(state)];
  for (const Parameter p : stack.parameters) layer.parameters[p] = const_data<Scalar>(*weight++);
  if (k == 0 && stack.has_ids) {
    layer.table.rows = std::exchange(layer.parameters[kWeightIh], nullptr);
    layer.table.V = stack.V;
  }
  return layer;
}

// Returns a kernel's arguments for direction d of layer k, which reads `input`.
template <class Scalar>
Layer<Scalar> direction_of(const Stack& stack, int64_t k, int64_t d, const Tensor& input) {
  Layer<Scalar> layer = layer_of<Scalar>(stack, k, d);
  if (k == 0 && stack.has_ids) {
    layer.table.ids = rows_of<const int64_t>(stack.batch, input, const_data<int64_t>(input), 0);
  } else {
    const int64_t column = stack.sums_given ? d * stack.gate_rows() : 0;
    layer.input = rows_of<const Scalar>(stack.batch, input, const_data<Scalar>(input), column);
  }
  for (size_t i = 0; i < stack.inputs.size(); ++i) {
    const Tensor& rows = stack.inputs[i];
    const int64_t column = stack.column_beside(i, last_size(rows), stack.state_of(k, d));
    layer.inputs[i] = rows_of<const Scalar>(stack.batch, rows, const_data<Scalar>(rows), column);
  }
  return layer;
}

// Sets where a kernel writes the gradients of the weights. `grad_weights` points to the gradients
// of one direction's weights. If bias_ih and bias_hh have the same gradient, the kernel writes only
// the gradient of bias_ih, and finish_backward() copies it.
template <class Scalar>
void set_weight_gradients(const Stack& stack, const Tensor* grad_weights, Backward<Scalar>& args) {
  for (const Parameter p : stack.parameters) {
    const bool is_copied = p == kBiasHh && stack.cell->one_bias_gradient;
    args.grads[p] = is_copied ? nullptr : mutable_data<Scalar>(*grad_weights);
    ++grad_weights;
  }
  args.wants_weights = true;
}

// Returns the gradients that belong to one layer and direction. `grad` holds the gradients of all
// last h or of all last cell states; if `grad` is absent, they are zeros.
template <class Scalar>
StateGradients<Scalar> gradients_of(const std::optional<Tensor>& grad, int64_t state) {
  if (!grad) return {nullptr, 0, 1};
  return {const_data<Scalar>(*grad) + state * grad->stride(0), grad->stride(1), grad->stride(2)};
}

// Calls f(state, b) for every sequence without rows, in every layer and direction. `state` is the
// index from Stack::state_of(), and `b` is the caller's index of the sequence.
template <class F>
void for_each_idle_state(const Stack& stack, F&& f) {
  const Batch& batch = stack.batch;
  for (int64_t i = batch.layout.B; i < batch.B; ++i) {
    const int64_t b = place_of(batch.layout, i);
    for (int64_t state = 0; state < stack.layers * stack.directions; ++state) f(state, b);
  }
}

}  // namespace namernn_fast
