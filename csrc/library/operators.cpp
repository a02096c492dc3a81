// Entry points and registration of the operators. Their schemas and fake kernels are in
// namernn_fast/ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "library/batch.h"
#include "library/options.h"
#include "library/passes.h"
#include "library/stack.h"
#include "plan.h"
#include "processor.h"

namespace namernn_fast {
namespace {

// Checks that a call with share_prefixes meets the conditions for it.
void check_sharing(const Stack& stack, const Options& options) {
  if (!options.share_prefixes) return;
  check(stack.has_ids, "input must be token ids when prefixes are shared, got features");
  check(stack.directions == 1, "sharing prefixes takes one direction, got ", stack.directions);
  check(!stack.hx, "hx must be None when prefixes are shared");
  check(!stack.batch.resets.at, "reset must be None when prefixes are shared");
  check(stack.dtype == aoti_torch_dtype_float32() || stack.dtype == aoti_torch_dtype_float64(),
        "weights must be float32 or float64 when prefixes are shared");
}

// A view of a contiguous tensor as (rows, features).
Tensor flat_rows(const Tensor& tensor) {
  return torch::stable::view(tensor, {-1, tensor.size(tensor.dim() - 1)});
}

using Tensors = std::vector<Tensor>;

// What the forward operators return. c_n is absent for a cell without cell states.
struct ForwardResults {
  Tensor output, h_n;
  std::optional<Tensor> c_n;
  Tensors hidden, kept;
};

// Runs the forward operator of a cell.
ForwardResults run_forward(CellKind cell, const Tensor& input, const std::optional<Tensor>& hx,
                           const std::optional<Tensor>& cx, const Tensors& weights,
                           const std::optional<Tensor>& sequence_layout,
                           const std::optional<Tensor>& reset, int64_t bits, int64_t trees) {
  const Options options = read_options(bits, trees);
  const Stack stack = check_stack(cell, input, hx, cx, weights,
                                  read_batch(input, sequence_layout, reset, options), options);
  check(!(options.last_state && options.want_hidden),
        "options must not set both LAST_STATE and WANT_HIDDEN");
  check_sharing(stack, options);
  const ForwardTensors results = forward_stack(stack, options);
  // The shape of `output` and of each tensor in `hidden` must not depend on the values of ids.
  const auto in_shape = [&](const Tensor& output) {
    return options.share_prefixes && output.dim() != 2 ? flat_rows(output) : output;
  };
  Tensors hidden;
  for (int64_t k = 0; options.want_hidden && k + 1 < stack.layers; ++k) {
    hidden.push_back(in_shape(*results.outputs[size_t(k)]));
  }
  Tensors kept;
  for (const Tensor& of_layer : results.kept) kept.push_back(in_shape(of_layer));
  return {options.last_state ? empty({0}, stack.dtype) : in_shape(*results.outputs.back()),
          results.h_n, results.c_n, hidden, kept};
}

// What the backward operators return: the gradients of their arguments, without elements if they
// are not wanted. That of cx is absent for a cell without cell states.
struct BackwardResults {
  Tensor input, hx;
  std::optional<Tensor> cx;
  Tensors weights;
};

// Runs the backward operator of a cell.
BackwardResults run_backward(CellKind cell, const std::optional<Tensor>& grad_output,
                             const std::optional<Tensor>& grad_h_n,
                             const std::optional<Tensor>& grad_c_n, const Tensor& input,
                             const std::optional<Tensor>& hx, const std::optional<Tensor>& cx,
                             const Tensors& weights, const Tensor& output, const Tensors& hidden,
                             const Tensors& kept, const std::optional<Tensor>& sequence_layout,
                             const std::optional<Tensor>& reset, int64_t bits, bool want_input,
                             bool want_hx, const std::vector<int64_t>& want_layers, int64_t trees) {
  const Options options = read_options(bits, trees);
  const Stack stack = check_stack(cell, input, hx, cx, weights,
                                  read_batch(input, sequence_layout, reset, options), options);
  std::vector<int64_t> output_shape(input.sizes().begin(), input.sizes().end());
  if (stack.has_ids) {
    check(!want_input, "want_input must be false for token ids");
    output_shape.push_back(0);
  }
  if (options.share_prefixes) output_shape = {input.numel(), 0};
  output_shape.back() = stack.directions * stack.H;
  check_sharing(stack, options);
  check(!(options.share_prefixes && grad_output),
        "grad_output must be None when prefixes are shared");

  BackwardTensors grads;
  check(int64_t(hidden.size()) == stack.layers - 1, "hidden must hold the outputs of ",
        stack.layers - 1, " layer(s), got ", hidden.size());
  // Kernels read the rows of trees as contiguous.
  const auto readable = [&](const Tensor& rows) {
    return options.share_prefixes ? dense(rows) : with_adjacent_features(rows);
  };
  for (const Tensor& of_layer : hidden) {
    check_tensor("hidden", of_layer, stack.dtype, output_shape);
    grads.outputs.push_back(readable(of_layer));
  }
  check_tensor("output", output, stack.dtype, output_shape);
  grads.outputs.push_back(readable(output));
  const int64_t kept_layers = stack.kept_size() > 0 ? stack.layers : 0;
  check(int64_t(kept.size()) == kept_layers, "kept must hold one tensor for each of ", kept_layers,
        " layer(s), got ", kept.size());
  std::vector<int64_t> kept_shape = output_shape;
  kept_shape.back() = stack.directions * stack.kept_size();
  for (const Tensor& of_layer : kept) {
    check_tensor("kept", of_layer, stack.dtype, kept_shape);
    grads.kept.push_back(readable(of_layer));
  }
  if (grad_output) {
    check_tensor("grad_output", *grad_output, stack.dtype, output_shape);
    grads.grad_output = with_adjacent_features(*grad_output);
  }
  grads.grad_h_n = grad_h_n;
  grads.grad_c_n = grad_c_n;
  if (grad_h_n) check_tensor("grad_h_n", *grad_h_n, stack.dtype, stack.state_shape());
  if (grad_c_n) check_tensor("grad_c_n", *grad_c_n, stack.dtype, stack.state_shape());
  if (want_input) grads.grad_input = empty_rows(stack.batch, stack.D, stack.dtype);
  if (want_hx) grads.grad_hx = empty(stack.state_shape(), stack.dtype);
  if (want_hx && stack.has_cell_state()) grads.grad_cx = empty(stack.state_shape(), stack.dtype);
  grads.want_weights.resize(size_t(stack.layers), false);
  for (const int64_t k : want_layers) {
    check(k >= 0 && k < stack.layers, "want_layers must be from 0 to ", stack.layers - 1, ", got ",
          k);
    grads.want_weights[size_t(k)] = true;
  }
  const size_t per_layer = size_t(stack.directions * stack.per_direction);
  for (size_t i = 0; i < stack.weights.size() && !want_layers.empty(); ++i) {
    const auto sizes = stack.weights[i].sizes();
    grads.grad_weights.push_back(
        grads.want_weights[i / per_layer]
            ? empty(std::vector<int64_t>(sizes.begin(), sizes.end()), stack.dtype)
            : empty({0}, stack.dtype));
  }
  backward_stack(stack, options, grads);
  const auto or_empty = [&](const std::optional<Tensor>& grad) {
    return grad ? *grad : empty({0}, stack.dtype);
  };
  BackwardResults results{
      or_empty(grads.grad_input), or_empty(grads.grad_hx), {}, grads.grad_weights};
  if (stack.has_cell_state()) results.cx = or_empty(grads.grad_cx);
  return results;
}

std::tuple<Tensor, Tensor, Tensors> rnn_forward(const Tensor& input,
                                                const std::optional<Tensor>& hx,
                                                const Tensors& weights,
                                                const std::optional<Tensor>& sequence_layout,
                                                const std::optional<Tensor>& reset, int64_t bits,
                                                int64_t trees) {
  const ForwardResults results =
      run_forward(CellKind::elman, input, hx, {}, weights, sequence_layout, reset, bits, trees);
  return {results.output, results.h_n, results.hidden};
}

std::tuple<Tensor, Tensor, Tensors> rnn_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const Tensor& input, const std::optional<Tensor>& hx, const Tensors& weights,
    const Tensor& output, const Tensors& hidden, const std::optional<Tensor>& sequence_layout,
    const std::optional<Tensor>& reset, int64_t bits, bool want_input, bool want_hx,
    const std::vector<int64_t>& want_layers, int64_t trees) {
  const BackwardResults results = run_backward(
      CellKind::elman, grad_output, grad_h_n, {}, input, hx, {}, weights, output, hidden, {},
      sequence_layout, reset, bits, want_input, want_hx, want_layers, trees);
  return {results.input, results.hx, results.weights};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> gru_forward(
    const Tensor& input, const std::optional<Tensor>& hx, const Tensors& weights,
    const std::optional<Tensor>& sequence_layout, const std::optional<Tensor>& reset, int64_t bits,
    int64_t trees) {
  const ForwardResults results =
      run_forward(CellKind::gru, input, hx, {}, weights, sequence_layout, reset, bits, trees);
  return {results.output, results.h_n, results.hidden, results.kept};
}

std::tuple<Tensor, Tensor, Tensors> gru_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const Tensor& input, const std::optional<Tensor>& hx, const Tensors& weights,
    const Tensor& output, const Tensors& hidden, const Tensors& kept,
    const std::optional<Tensor>& sequence_layout, const std::optional<Tensor>& reset, int64_t bits,
    bool want_input, bool want_hx, const std::vector<int64_t>& want_layers, int64_t trees) {
  const BackwardResults results =
      run_backward(CellKind::gru, grad_output, grad_h_n, {}, input, hx, {}, weights, output, hidden,
                   kept, sequence_layout, reset, bits, want_input, want_hx, want_layers, trees);
  return {results.input, results.hx, results.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors> lstm_forward(
    const Tensor& input, const std::optional<Tensor>& hx, const std::optional<Tensor>& cx,
    const Tensors& weights, const std::optional<Tensor>& sequence_layout,
    const std::optional<Tensor>& reset, int64_t bits, int64_t trees) {
  const ForwardResults results =
      run_forward(CellKind::lstm, input, hx, cx, weights, sequence_layout, reset, bits, trees);
  return {results.output, results.h_n, *results.c_n, results.hidden, results.kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const std::optional<Tensor>& grad_c_n, const Tensor& input, const std::optional<Tensor>& hx,
    const std::optional<Tensor>& cx, const Tensors& weights, const Tensor& output,
    const Tensors& hidden, const Tensors& kept, const std::optional<Tensor>& sequence_layout,
    const std::optional<Tensor>& reset, int64_t bits, bool want_input, bool want_hx,
    const std::vector<int64_t>& want_layers, int64_t trees) {
  const BackwardResults results = run_backward(
      CellKind::lstm, grad_output, grad_h_n, grad_c_n, input, hx, cx, weights, output, hidden, kept,
      sequence_layout, reset, bits, want_input, want_hx, want_layers, trees);
  return {results.input, results.hx, *results.cx, results.weights};
}

// The plan for any machine: groups, members, expected time in ns, and layers that run at once.
std::tuple<int64_t, int64_t, double, int64_t> cpu_plan(const std::vector<int64_t>& batch_sizes,
                                                       int64_t input_size, int64_t hidden_size,
                                                       int64_t num_layers, int64_t threads,
                                                       int64_t l2_bytes, int64_t weight_blocks) {
  SequenceLayout layout{};
  layout.T = int64_t(batch_sizes.size());
  layout.count = batch_sizes.data();
  for (const int64_t size : batch_sizes) {
    layout.B = std::max(layout.B, size);
    layout.N += size;
  }
  const Machine machine{threads, size_t(l2_bytes)};
  const Workload workload{
      layout,        machine,      input_size, hidden_size, panels_of(hidden_size),
      sizeof(float), weight_blocks};
  const Plan plan = choose_plan(workload);
  const Wave wave = choose_wave(workload, num_layers, Pass::forward);
  return {plan.groups, plan.members, plan.time, wave.layers};
}

std::string cpu_kernel(bool bfloat16) {
  return bfloat16 ? kernels().bfloat16_name : kernels().name;
}

}  // namespace
}  // namespace namernn_fast

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CPU, library) {
  library.impl("rnn_forward", TORCH_BOX(&namernn_fast::rnn_forward));
  library.impl("rnn_backward", TORCH_BOX(&namernn_fast::rnn_backward));
  library.impl("gru_forward", TORCH_BOX(&namernn_fast::gru_forward));
  library.impl("gru_backward", TORCH_BOX(&namernn_fast::gru_backward));
  library.impl("lstm_forward", TORCH_BOX(&namernn_fast::lstm_forward));
  library.impl("lstm_backward", TORCH_BOX(&namernn_fast::lstm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_kernel", TORCH_BOX(&namernn_fast::cpu_kernel));
  library.impl("cpu_plan", TORCH_BOX(&namernn_fast::cpu_plan));
}

// Importing this otherwise empty module loads the library, which registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
