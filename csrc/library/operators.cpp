// Entry points and registration of the operators. The schemas and fake kernels of the operators are
// in namernn_fast/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "library/arguments/batch.h"
#include "library/arguments/options.h"
#include "library/arguments/program.h"
#include "library/arguments/stack.h"
#include "library/base/memory.h"
#include "library/inference/prepared.h"
#include "library/inference/step.h"
#include "library/passes/passes.h"
#include "plan.h"
#include "processor.h"

namespace namernn_fast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using OptionalText = std::optional<StringHandle>;

// Takes ownership of a string argument, and returns its text. Operators take handles because
// torch's conversion to std::string leaks a copy of the string on every call.
std::string take(StringHandle handle) {
  size_t length;
  const char* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// Returns the cell for the arguments `cell` and `program` of an operator, and takes ownership of
// `program`. Operators call it first, so that no error leaks the string.
std::shared_ptr<const Cell> take_cell(int64_t cell, OptionalText program) {
  if (!program) return cell_of(cell, std::nullopt);
  return cell_of(cell, take(*program));
}

// Checks the preconditions of share_prefixes.
void check_sharing(const Stack& stack, const Options& options) {
  if (!options.share_prefixes) return;
  check(stack.has_ids, "input must be token ids when prefixes are shared, got features");
  check(stack.directions == 1, "sharing prefixes takes one direction, got ", stack.directions);
  check(stack.states.empty(), "states must be empty when prefixes are shared");
  check(stack.inputs.empty(), "inputs must be empty when prefixes are shared");
  check(!stack.has_projections(), "shared prefixes do not support projections");
  check(!stack.batch.resets.at, "reset must be None when prefixes are shared");
  check(!stack.int8 && (stack.dtype == aoti_torch_dtype_float32() ||
                        stack.dtype == aoti_torch_dtype_float64()),
        "weights must be float32 or float64 when prefixes are shared");
}

// Checks the arguments that `forward` and `backward` share, and returns them as a Stack.
Stack check_call(std::shared_ptr<const Cell> cell, const Tensor& input, const Tensors& tensors,
                 const OptionalTensor& sequence_layout, const OptionalTensor& reset,
                 const Options& options) {
  check_given("input", input);
  check(!options.int8, "options must not set INT8 without prepared weights");
  check(!options.for_backward, "options must not set FOR_BACKWARD without prepared weights");
  const Lists lists = split(*cell, tensors, options);
  Stack stack = check_stack(*cell, input, lists.states, lists.weights,
                            read_batch(input, sequence_layout, reset, options), options);
  stack.owned_cell = std::move(cell);
  set_reset_to(stack, lists.reset_to, reset.has_value());
  set_inputs(stack, lists.inputs);
  check_sharing(stack, options);
  return stack;
}

std::tuple<Tensor, Tensors, Tensors> run_forward(const Stack& stack, const Options& options) {
  check(!(options.last_state && options.want_saved),
        "options must not set both LAST_STATE and WANT_SAVED");
  ForwardTensors results = forward_stack(stack, options);
  // The shapes of the results must not depend on the values of the token ids.
  const auto in_shape = [&](const Tensor& output) {
    if (!options.share_prefixes || output.dim() == 2) return output;
    return torch::stable::view(output, {stack.input.numel(), output.size(2)});
  };
  Tensors saved;
  for (size_t k = 0; options.want_saved && k + 1 < results.outputs.size(); ++k) {
    saved.push_back(in_shape(*results.outputs[k]));
  }
  for (const Tensor& kept : results.kept) saved.push_back(in_shape(kept));
  return {options.last_state ? empty({0}, stack.dtype) : in_shape(*results.outputs.back()),
          std::move(results.last_states), std::move(saved)};
}

std::tuple<Tensor, Tensors, Tensors> forward(int64_t cell, const Tensor& input,
                                             const Tensors& tensors,
                                             const OptionalTensor& sequence_layout,
                                             const OptionalTensor& reset, int64_t bits,
                                             int64_t trees, OptionalText program) {
  std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, trees);
  return run_forward(
      check_call(std::move(described), input, tensors, sequence_layout, reset, options), options);
}

Sizes sizes_of(const std::vector<int64_t>& sizes) {
  if (sizes.size() != 6 || sizes[0] < 1 || sizes[1] < 0 || sizes[2] < 1 || sizes[3] < 0) {
    fail("sizes must be num_layers, input_size, hidden_size, vocabulary, the size of h and heads, ",
         "got ", shape_text(sizes));
  }
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
}

std::tuple<Tensor, Tensors> forward_prepared(int64_t cell, const Tensor& input,
                                             const Tensors& tensors,
                                             const std::vector<int64_t>& sizes,
                                             const OptionalTensor& sequence_layout,
                                             const OptionalTensor& reset, int64_t bits,
                                             int64_t trees, OptionalText program) {
  const std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, trees);
  check_given("input", input);
  check(!options.want_saved && !options.for_backward,
        "options must not set WANT_SAVED or FOR_BACKWARD for a prepared layer");
  const Lists lists = split(*described, tensors, options);
  check(lists.weights.size() == 1, "tensors must end with one prepared tensor, got ",
        lists.weights.size());
  const Tensor& prepared = lists.weights[0];
  Stack stack = check_prepared_stack(*described, input, lists.states,
                                     dtype_of_weights(dtype_of(prepared), options), sizes_of(sizes),
                                     read_batch(input, sequence_layout, reset, options), options);
  set_prepared(stack, prepared);
  set_reset_to(stack, lists.reset_to, reset.has_value());
  set_inputs(stack, lists.inputs);
  check_sharing(stack, options);
  auto [output, last_states, saved] = run_forward(stack, options);
  return {std::move(output), std::move(last_states)};
}

// Checks the weights, and returns a Stack with these weights and its batch unset.
Stack check_layers_to_prepare(const Cell& cell, const Tensors& weights,
                              const std::vector<int64_t>& sizes, int32_t dtype,
                              const Options& options) {
  Stack stack = check_layers(cell, sizes_of(sizes), dtype, options);
  set_weights(stack, weights);
  return stack;
}

Tensor prepare_operator(int64_t cell, const Tensors& weights, const std::vector<int64_t>& sizes,
                        int64_t bits, OptionalText program) {
  const std::shared_ptr<const Cell> described = take_cell(cell, program);
  check(!weights.empty(), "weights must not be empty");
  const Options options = read_options(bits, 0);
  return prepare(
      check_layers_to_prepare(*described, weights, sizes, dtype_of(weights[0]), options));
}

void refresh_operator(const Tensor& prepared, int64_t cell, const Tensors& weights,
                      const std::vector<int64_t>& sizes, int64_t bits, OptionalText program) {
  const std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, 0);
  check_given("prepared", prepared);
  const int32_t dtype = dtype_of_weights(dtype_of(prepared), options);
  refresh(check_layers_to_prepare(*described, weights, sizes, dtype, options), prepared);
}

Tensors unpack_operator(const Tensor& prepared, int64_t cell, const std::vector<int64_t>& sizes,
                        int64_t bits, OptionalText program) {
  const std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, 0);
  const int32_t dtype = dtype_of_weights(dtype_of(prepared), options);
  Stack stack = check_layers(*described, sizes_of(sizes), dtype, options);
  check(!options.for_backward, "options must not set FOR_BACKWARD to unpack weights");
  set_prepared(stack, prepared);
  return unpack(stack);
}

Tensor step_operator(int64_t cell, const Tensor& prepared, const Tensors& states,
                     const Tensor& input, const OptionalTensor& rows, const Tensors& inputs,
                     int64_t bits, OptionalText program) {
  const std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, 0);
  check_given("prepared", prepared);
  check_given("input", input);
  check(!states.empty() && states.size() <= size_t(kMostStates), "states must hold 1 to ",
        kMostStates, " tensors, got ", states.size());
  bool on_cpu = prepared.is_cpu() && input.is_cpu() && (!rows || rows->is_cpu());
  for (const Tensor& state : states) on_cpu = on_cpu && state.is_cpu();
  for (const Tensor& beside : inputs) on_cpu = on_cpu && beside.is_cpu();
  check(on_cpu, "all tensors of a step must be on the CPU");
  check(input.dim() > 0 && states[0].dim() > 0, "frame and states must have dimensions");
  const bool ids = has_ids(input);
  const Tensor frame = ids ? input : with_adjacent_features(input);
  std::vector<int64_t> shape(frame.sizes().begin(), frame.sizes().end());
  if (ids) shape.push_back(0);
  shape.back() = states[0].size(states[0].dim() - 1);
  const Tensor output = empty(shape, dtype_of_weights(dtype_of(prepared), options));
  Step step{};
  step.cell = described.get();
  step.weights[0] = view_of(prepared);
  step.weight_count = 1;
  step.frame = view_of(frame);
  step.output = view_of(output);
  step.output.data = mutable_data<char>(output);
  step.is_of_stream = true;
  step.row_count = -1;
  step.state_count = step.last_count = int64_t(states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    step.states[i] = view_of(states[i]);
    step.states[i].data = mutable_data<char>(states[i]);
    step.last[i] = step.states[i];
  }
  check(inputs.size() <= size_t(kMostInputs), "inputs must hold at most ", kMostInputs,
        " tensor(s), got ", inputs.size());
  Tensors beside;
  for (size_t i = 0; i < inputs.size(); ++i) {
    beside.push_back(dense(inputs[i]));
    step.inputs[i] = view_of(beside.back());
  }
  const Tensor places = rows ? dense(*rows) : frame;
  if (rows) {
    check(has_ids(places) && places.dim() == 1, "rows must be int64, with 1 dimension");
    step.rows = const_data<int64_t>(places);
    step.row_count = places.numel();
  }
  run_step(step, options);
  return output;
}

// Checks the results of the forward pass and stores them in `grads`.
void read_results(const Stack& stack, const Options& options, const Tensor& output,
                  const Tensors& saved, BackwardTensors& grads) {
  std::vector<int64_t> shape(stack.input.sizes().begin(), stack.input.sizes().end());
  if (stack.has_ids) shape.push_back(0);
  if (options.share_prefixes) shape = {stack.input.numel(), 0};
  const int64_t kept_layers = stack.keeps() ? stack.layers : 0;
  check(int64_t(saved.size()) == stack.layers - 1 + kept_layers, "saved must hold ",
        stack.layers - 1 + kept_layers, " tensor(s), got ", saved.size());
  const auto check_rows = [&](const char* name, const Tensor& rows, int64_t features) {
    shape.back() = stack.directions * features;
    check_tensor(name, rows, stack.dtype, shape);
    // Kernels assume that the rows of trees are contiguous.
    return options.share_prefixes ? dense(rows) : with_adjacent_features(rows);
  };
  for (const Tensor& rows : saved) {
    if (int64_t(grads.outputs.size()) < stack.layers - 1) {
      grads.outputs.push_back(check_rows("an output in saved", rows, stack.P));
    } else {
      grads.kept.push_back(check_rows("what a layer keeps in saved", rows, stack.kept_size()));
    }
  }
  grads.outputs.push_back(check_rows("output", output, stack.P));
}

// Checks the gradients of the results and stores them in `grads`.
void read_gradients(const Stack& stack, const Options& options, const OptionalTensor& grad_output,
                    const std::vector<OptionalTensor>& grad_last_states, BackwardTensors& grads) {
  check(!(options.share_prefixes && grad_output),
        "grad_output must be None when prefixes are shared");
  if (grad_output) {
    const auto shape = grads.outputs.back().sizes();
    check_tensor("grad_output", *grad_output, stack.dtype, shape);
    grads.grad_output = with_adjacent_features(*grad_output);
  }
  check(grad_last_states.size() == stack.state_count(), "grad_last_states must hold ",
        stack.state_count(), " gradient(s), got ", grad_last_states.size());
  for (size_t i = 0; i < grad_last_states.size(); ++i) {
    if (!grad_last_states[i]) continue;
    static constexpr const char* names[kMostStates] = {
        "grad_h_n", "grad_c_n", "grad_last_states[2]", "grad_last_states[3]"};
    check_tensor(names[i], *grad_last_states[i], stack.dtype, stack.state_shape(i));
  }
  grads.grad_last_states = grad_last_states;
}

// Allocates the requested gradients. grads.grad_weights is indexed like Stack::weights, and has an
// empty tensor for each gradient that is not requested.
void allocate_gradients(const Stack& stack, const std::vector<bool>& wanted,
                        const std::vector<int64_t>& want_layers, BackwardTensors& grads) {
  const size_t states = stack.states.size() + stack.reset_to.size();
  const size_t tensors = 1 + states + stack.inputs.size();
  check(wanted.size() == tensors, "wanted must say whether input and each of ", tensors - 1,
        " state(s) and inputs need a gradient, got ", wanted.size(), " values");
  check(!(stack.has_ids && wanted[0]), "wanted must not ask for the gradient of token ids");
  if (wanted[0]) grads.grad_input = empty_rows(stack.batch, stack.input_features(), stack.dtype);
  const auto first_reset = wanted.begin() + 1 + int64_t(stack.states.size());
  const auto first_input = wanted.begin() + 1 + int64_t(states);
  for (auto want = first_input; want != wanted.end(); ++want) {
    const int64_t features = stack.all_features_beside(grads.grad_inputs.size());
    grads.grad_inputs.emplace_back();
    if (*want) grads.grad_inputs.back() = empty_rows(stack.batch, features, stack.dtype);
  }
  if (std::find(wanted.begin() + 1, first_reset, true) != first_reset) {
    for (size_t i = 0; i < stack.states.size(); ++i) {
      grads.grad_states.push_back(empty(stack.state_shape(i), stack.dtype));
    }
  }
  if (std::find(first_reset, first_input, true) != first_input) {
    for (const Tensor& like : stack.reset_to) {
      const auto sizes = like.sizes();
      grads.grad_reset_to.push_back(zeros({sizes.begin(), sizes.end()}, stack.dtype));
    }
  }
  grads.want_weights.resize(size_t(stack.layers), false);
  for (const int64_t k : want_layers) {
    check(k >= 0 && k < stack.layers, "want_layers must be between 0 and ", stack.layers - 1,
          ", got ", k);
    grads.want_weights[size_t(k)] = true;
  }
  const size_t per_layer = stack.first_weight(stack.directions);
  for (size_t i = 0; i < stack.weights.size() && !want_layers.empty(); ++i) {
    const bool is_wanted = grads.want_weights[i / per_layer];
    grads.grad_weights.push_back(is_wanted ? uninitialized_like(stack.weights[i])
                                           : empty({0}, stack.dtype));
  }
}

// Returns the gradient of the i-th input besides x, given its gradients for each layer and
// direction.
Tensor sum_if_shared(const Stack& stack, size_t i, const Tensor& grad) {
  if (last_size(grad) == last_size(stack.inputs[i])) return grad;
  const auto sizes = grad.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  shape.insert(shape.end(), {stack.layers * stack.directions, stack.features_beside(i)});
  const Tensor parts = torch::stable::view(grad, shape);
  return torch::stable::sum(parts, std::vector<int64_t>{int64_t(shape.size()) - 2});
}

Tensors backward(int64_t cell, const Tensor& input, const Tensors& tensors,
                 const OptionalTensor& sequence_layout, const OptionalTensor& reset, int64_t bits,
                 int64_t trees, const Tensor& output, const Tensors& saved,
                 const OptionalTensor& grad_output,
                 const std::vector<OptionalTensor>& grad_last_states,
                 const std::vector<bool>& wanted, const std::vector<int64_t>& want_layers,
                 OptionalText program) {
  std::shared_ptr<const Cell> described = take_cell(cell, program);
  const Options options = read_options(bits, trees);
  const Stack stack =
      check_call(std::move(described), input, tensors, sequence_layout, reset, options);
  check_given("output", output);
  BackwardTensors grads;
  read_results(stack, options, output, saved, grads);
  read_gradients(stack, options, grad_output, grad_last_states, grads);
  allocate_gradients(stack, wanted, want_layers, grads);
  backward_stack(stack, options, grads);
  Tensors gradients;
  if (wanted[0]) gradients.push_back(*grads.grad_input);
  auto want = wanted.begin() + 1;
  for (size_t i = 0; i < stack.states.size(); ++i) {
    if (*want++) gradients.push_back(grads.grad_states[i]);
  }
  for (size_t i = 0; i < stack.reset_to.size(); ++i) {
    if (*want++) gradients.push_back(grads.grad_reset_to[i]);
  }
  for (size_t i = 0; i < grads.grad_inputs.size(); ++i) {
    const OptionalTensor& grad = grads.grad_inputs[i];
    if (grad) gradients.push_back(sum_if_shared(stack, i, *grad));
  }
  const size_t per_layer = stack.first_weight(stack.directions);
  for (size_t i = 0; i < grads.grad_weights.size(); ++i) {
    if (grads.want_weights[i / per_layer]) gradients.push_back(grads.grad_weights[i]);
  }
  return gradients;
}

constexpr int64_t kMostThreads = int64_t(1) << 16;  // choose_plan() is fast up to this many threads

// Returns the plan for a machine with this many threads and this size of L2 cache, as (groups,
// members, estimated time in ns, number of concurrent layers).
std::tuple<int64_t, int64_t, double, int64_t> cpu_plan(const std::vector<int64_t>& batch_sizes,
                                                       int64_t input_size, int64_t hidden_size,
                                                       int64_t num_layers, int64_t threads,
                                                       int64_t l2_bytes, int64_t weight_blocks,
                                                       bool backward) {
  for (const int64_t size : {input_size, hidden_size, num_layers, l2_bytes}) {
    product_of("a layer", {size});
  }
  check(threads >= 1 && threads <= kMostThreads, "threads must be between 1 and ", kMostThreads,
        ", got ", threads);
  check(num_layers >= 1 && weight_blocks >= 1 && weight_blocks <= 4,
        "num_layers and weight_blocks must be at least 1, and weight_blocks at most 4, got ",
        num_layers, " and ", weight_blocks);
  SequenceLayout layout{};
  layout.T = int64_t(batch_sizes.size());
  layout.count = batch_sizes.data();
  for (const int64_t size : batch_sizes) {
    check(size >= 0 && size <= kMostElements, "batch_sizes must be between 0 and ", kMostElements,
          ", got ", size);
    layout.B = std::max(layout.B, size);
    layout.N += size;
  }
  const Machine machine{threads, size_t(l2_bytes)};
  const PlanArguments arguments{backward ? Pass::backward : Pass::forward,
                                layout,
                                machine,
                                input_size,
                                hidden_size,
                                panels_of(hidden_size),
                                sizeof(float),
                                weight_blocks,
                                1,
                                hidden_size};
  const Plan plan = choose_plan(arguments);
  const Wave wave = choose_wave(arguments, num_layers);
  return {plan.groups, plan.members, plan.time, wave.layers};
}

// Returns the name of the instructions that multiply float numbers, bfloat16 numbers or 8-bit
// integers.
std::string cpu_kernel(StringHandle argument) {
  const std::string numbers = take(argument);
  check(numbers == "float" || numbers == "bfloat16" || numbers == "int8",
        "numbers must be float, bfloat16 or int8, got ", numbers);
  return numbers == "int8"       ? kernels().int8->name
         : numbers == "bfloat16" ? kernels().bfloat16_name
                                 : kernels().name;
}

// Returns the number of bfloat16 terms that a call of these sizes splits each float into; 0 if its
// products use floats.
int64_t cpu_terms(int64_t bits, int64_t steps, int64_t sequences, int64_t rows,
                  int64_t hidden_size) {
  SequenceLayout layout{};
  layout.T = steps;
  layout.B = sequences;
  layout.N = rows;
  return terms_of(layout, hidden_size, read_options(bits, 0));
}

}  // namespace
}  // namespace namernn_fast

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CPU, library) {
  library.impl("forward", TORCH_BOX(&namernn_fast::forward));
  library.impl("backward", TORCH_BOX(&namernn_fast::backward));
  library.impl("forward_prepared", TORCH_BOX(&namernn_fast::forward_prepared));
  library.impl("prepare", TORCH_BOX(&namernn_fast::prepare_operator));
  library.impl("step", TORCH_BOX(&namernn_fast::step_operator));
  library.impl("refresh", TORCH_BOX(&namernn_fast::refresh_operator));
  library.impl("unpack", TORCH_BOX(&namernn_fast::unpack_operator));
}

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_kernel", TORCH_BOX(&namernn_fast::cpu_kernel));
  library.impl("cpu_plan", TORCH_BOX(&namernn_fast::cpu_plan));
  library.impl("cpu_terms", TORCH_BOX(&namernn_fast::cpu_terms));
  library.impl("memory_reserved", TORCH_BOX(&namernn_fast::memory_reserved));
  library.impl("empty_cache", TORCH_BOX(&namernn_fast::empty_cache));
}
