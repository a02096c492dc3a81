#include "library/arguments/stack.h"

#include <algorithm>

namespace namernn_fast {
namespace {

constexpr int64_t kMostPadding = 256;  // maximum padding of a panel or row, in elements

// Checks that no size derived from the sizes of a stack overflows, even with padding.
void check_sizes(const Stack& stack) {
  check(stack.V == 0 || stack.D == 0,
        "a stack with a vocabulary must have an input_size of 0, got ", stack.D);
  const auto padded = [](int64_t size) { return product_of("a weight", {size}) + kMostPadding; };
  const int64_t rows = stack.cell->gates * padded(stack.H);
  const int64_t features = padded(std::max(stack.D, stack.H));
  product_of("weights", {stack.layers, stack.directions, rows, features});
  product_of("a table", {stack.V, rows});
}

// Checks that tensors with the batch's rows are not too large.
void check_rows(const Stack& stack) {
  const int64_t rows = std::max(count_tensor_rows(stack.batch), stack.batch.layout.N);
  const int64_t gates = stack.directions * stack.gate_rows();
  int64_t features = std::max(stack.D, gates);
  for (size_t i = 0; i < size_t(stack.cell->inputs); ++i) {
    features = std::max(features, stack.all_features_beside(i));
  }
  product_of("a tensor", {rows, features});
}

// Checks and sets the fields that depend neither on the batch nor on the weights.
void set_sizes(Stack& stack, const Cell& cell, const Sizes& sizes, int32_t dtype,
               const Options& options) {
  stack.layers = sizes.layers;
  stack.D = sizes.D;
  stack.H = sizes.H;
  stack.P = sizes.P;
  stack.V = sizes.V;
  stack.heads = sizes.heads;
  stack.sums_given = options.sums;
  stack.dtype = dtype;
  stack.directions = options.bidirectional ? 2 : 1;
  stack.batch_invariant = options.batch_invariant;
  stack.parameters = parameters_of(cell, options);
  stack.int8 = options.int8;
  stack.backward_panels = options.for_backward;
  stack.activation = options.activation;
  stack.cell = &cell;
  check_sizes(stack);
  check(int64_t(options.activation) < cell.activations,
        "options must not set this nonlinearity for the ", cell.name, " cell");
  check(cell.can_project || !options.projections, "options must not set PROJECTIONS for the ",
        cell.name, " cell");
  const int64_t last = sizes.H - options.projections, first = options.projections ? 1 : last;
  check(first <= sizes.P && sizes.P <= last, "the size of h must be between ", first, " and ", last,
        ", got ", sizes.P);
  check(can_have_heads(cell, sizes.H, sizes.heads), "a ", cell.name, " cell with hidden_size ",
        sizes.H, " cannot have ", sizes.heads, " heads");
  check(!options.sums || (sizes.layers == 1 && sizes.D == 0 && sizes.V == 0),
        "options must set SUMS for a single layer only, with features of sums, not token ids");
  if (!options.int8) return;
  check(!options.projections, "8-bit weights do not support projections");
  check(!stack.needs_floats(), "8-bit weights do not support the ", cell.name, " cell");
  check(dtype == aoti_torch_dtype_float32(), "8-bit weights need inputs in float32");
  const int64_t most = std::max(stack.D, (stack.layers > 1 ? stack.directions : 1) * stack.H);
  check(most <= kMostInt8Inputs, "8-bit weights take at most ", kMostInt8Inputs,
        " inputs of a layer, got ", most);
}

// Sets the number of terms, once the batch is known.
void set_terms(Stack& stack, const Options& options) {
  if (stack.dtype != aoti_torch_dtype_float32() || stack.needs_floats()) return;
  stack.terms = terms_of(stack.batch.layout, stack.H, options);
}

// Checks the input, and returns a Stack without states or weights. `dtype` is the dtype of the
// weights.
Stack check_input(const Cell& cell, const Tensor& input, const Sizes& sizes, int32_t dtype,
                  Batch batch, const Options& options) {
  check(input.is_cpu(), "input must be on the CPU");
  const bool ids = has_ids(input);
  Stack stack{std::move(batch), ids, ids ? input : with_adjacent_features(input)};
  set_sizes(stack, cell, sizes, ids ? dtype : dtype_of(input), options);
  check_rows(stack);
  if (ids) check_ids(stack.batch, input, stack.V);
  set_terms(stack, options);
  return stack;
}

// Checks that given sums have a block for each gate and direction.
void check_sums(const Stack& stack) {
  if (!stack.sums_given) return;
  const int64_t features = last_size(stack.input);
  check(features == stack.input_features(), "input must have ", stack.input_features(),
        " sums for each step, got ", features);
}

void check_states(Stack& stack, TensorRange states) {
  for (size_t i = 0; i < states.size(); ++i) {
    static constexpr const char* names[kMostStates] = {"hx", "cx", "hx[2]", "hx[3]"};
    check_tensor(names[i], states[i], stack.dtype, stack.state_shape(i));
    stack.states.push_back(with_adjacent_features(states[i]));
  }
}

}  // namespace

Lists split(const Cell& cell, const Tensors& tensors, const Options& options) {
  check(cell.inputs || !options.inputs, "options must not set INPUTS for the ", cell.name, " cell");
  Lists lists;
  const Tensor *next = tensors.data(), *const end = next + tensors.size();
  const auto take = [&](int64_t count) {
    check(end - next > count, "tensors must hold states and inputs, as options say, and ",
          "then weights, got ", tensors.size(), " tensor(s)");
    next += count;
    return TensorRange(next - count, next);
  };
  if (options.states) lists.states = take(cell.states);
  if (options.reset_to) lists.reset_to = take(cell.states);
  if (options.inputs) lists.inputs = take(cell.inputs);
  lists.weights = TensorRange(next, end);
  return lists;
}

void set_reset_to(Stack& stack, TensorRange reset_to, bool has_reset) {
  if (reset_to.empty()) return;
  check(has_reset, "reset_to needs reset, got none");
  check(stack.directions == 1, "reset_to takes one direction, got ", stack.directions);
  for (size_t i = 0; i < reset_to.size(); ++i) {
    check_tensor("reset_to", reset_to[i], stack.dtype,
                 {stack.batch.T, stack.layers, stack.batch.B, stack.size_of_state(i)});
    stack.reset_to.push_back(with_adjacent_features(reset_to[i]));
  }
}

void set_inputs(Stack& stack, TensorRange inputs) {
  std::vector<int64_t> shape(stack.input.sizes().begin(), stack.input.sizes().end());
  if (stack.has_ids) shape.push_back(0);
  for (const Tensor& rows : inputs) {
    const size_t i = stack.inputs.size();
    shape.back() = stack.checked_width(i, last_size(rows));
    check_tensor(stack.cell->input_names[i], rows, stack.dtype, shape);
    stack.inputs.push_back(with_adjacent_features(rows));
  }
}

void set_weights(Stack& stack, TensorRange weights) {
  const int64_t directions = stack.layers * stack.directions;
  const int64_t count = directions * stack.parameters.count;
  check(int64_t(weights.size()) == count, "weights must hold ", count, " tensors, got ",
        weights.size());
  stack.weights.reserve(weights.size());
  for (int64_t i = 0; i < directions; ++i) {
    const int64_t layer = i / stack.directions;
    for (const Parameter p : stack.parameters) {
      const Tensor& weight = weights[stack.weights.size()];
      const bool is_table = p == kWeightIh && layer == 0 && stack.has_ids;
      check_tensor(is_table ? "the table of weight_ih" : name_of(*stack.cell, p), weight,
                   stack.dtype, stack.shape_of(p, layer));
      stack.weights.push_back(dense(weight));
    }
  }
}

int64_t terms_of(const SequenceLayout& layout, int64_t H, const Options& options) {
  // A speed estimate decides whether share_prefixes uses trees. This choice must not change the
  // precision. Because kernels for trees have no bfloat16 terms, share_prefixes never uses terms.
  if (options.terms == 0 || options.share_prefixes || options.projections) return 0;
  if (!kernels().float_on_pairs) return 0;
  return choose_terms(options.terms, layout, H, options.batch_invariant);
}

void set_rows(Stack& stack, int64_t T, int64_t B, const Options& options) {
  SequenceLayout& layout = stack.batch.layout;
  layout.T = T;
  layout.B = B;
  layout.N = product_of("a tensor", {T, B});
  check_rows(stack);
  set_terms(stack, options);
}

Stack check_stack(const Cell& cell, const Tensor& input, TensorRange states, TensorRange weights,
                  Batch batch, const Options& options) {
  const int64_t directions = options.bidirectional ? 2 : 1;
  const ParameterList parameters = parameters_of(cell, options);
  const int64_t per_layer = directions * parameters.count;
  const int64_t count = int64_t(weights.size());
  check(count > 0 && per_layer > 0 && count % per_layer == 0, "weights must hold ", per_layer,
        " tensors for each layer, got ", count);
  const bool ids = has_ids(input);
  // The rows of weight_hh or, without it, of weight_ih give H. Given sums do, without both.
  const Parameter sized = cell.has_weight_hh ? kWeightHh : kWeightIh;
  const Tensor& weight = weights[cell.has_weight_hh && !options.sums];
  int64_t H = 0, heads = 1;
  if (sized == kWeightIh && options.sums) {
    H = last_size(input) / directions / cell.gates;
  } else {
    check(weight.dim() == 2, name_of(cell, sized), " must have 2 dimensions, got ", weight.dim());
    H = weight.size(ids && sized == kWeightIh) / cell.gates;
    if (cell.can_have_heads) heads = heads_of(cell, H, weight.size(1));
  }
  Sizes sizes{count / per_layer, 0, H, 0, options.projections ? weight.size(1) : H, heads};
  if (options.sums) {
    check(!ids, "input must hold sums, not token ids");
  } else if (ids) {
    check(weights[kWeightIh].dim() == 2, "the table of weight_ih must have 2 dimensions, got ",
          weights[kWeightIh].dim());
    sizes.V = weights[kWeightIh].size(0);
  } else {
    sizes.D = input.size(input.dim() - 1);
  }
  Stack stack = check_input(cell, input, sizes, dtype_of(weight), std::move(batch), options);
  check_sums(stack);
  check_states(stack, states);
  set_weights(stack, weights);
  return stack;
}

Stack check_prepared_stack(const Cell& cell, const Tensor& input, TensorRange states, int32_t dtype,
                           const Sizes& sizes, Batch batch, const Options& options) {
  check(has_ids(input) == (sizes.V > 0), "input must be ",
        sizes.V > 0 ? "token ids" : "features, not token ids,", " for this prepared layer");
  Stack stack = check_input(cell, input, sizes, dtype, std::move(batch), options);
  check(stack.dtype == dtype, "input must have the dtype of the prepared layer");
  const int64_t D = input.size(input.dim() - 1);
  check(stack.has_ids || stack.sums_given || D == stack.D, "input must have ", stack.D,
        " features, got ", D);
  check_sums(stack);
  check_states(stack, states);
  return stack;
}

Stack check_layers(const Cell& cell, const Sizes& sizes, int32_t dtype, const Options& options) {
  Stack stack{};
  stack.has_ids = sizes.V > 0;
  set_sizes(stack, cell, sizes, dtype, options);
  return stack;
}

}  // namespace namernn_fast
