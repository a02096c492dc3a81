#include <algorithm>
#include <type_traits>

#include "library/passes/passes.h"
#include "library/passes/schedule.h"
#include "library/passes/tree_passes.h"

namespace namernn_fast {
namespace {

// Returns a kernel's arguments for direction d of layer k, given the gradient of the layer's
// output. The first direction writes the gradient of the input to `grad_input`; the second
// direction adds to `grad_input`.
template <class Scalar>
Backward<Scalar> backward_of(const Stack& stack, const BackwardTensors& grads, int64_t k, int64_t d,
                             const std::optional<Tensor>& grad_output,
                             const std::optional<Tensor>& grad_input) {
  const Batch& batch = stack.batch;
  const int64_t column = d * stack.P;
  const int64_t state = stack.state_of(k, d);
  const Tensor& output = grads.outputs[size_t(k)];
  Backward<Scalar> args{};
  args.layer = direction_of<Scalar>(stack, k, d, k ? grads.outputs[size_t(k - 1)] : stack.input);
  args.output = rows_of<const Scalar>(batch, output, const_data<Scalar>(output), column);
  if (!grads.kept.empty()) {
    const Tensor& kept = grads.kept[size_t(k)];
    args.kept = rows_of<const Scalar>(batch, kept, const_data<Scalar>(kept), d * stack.kept_size());
  }
  if (grad_output) {
    args.grad_output =
        rows_of<const Scalar>(batch, *grad_output, const_data<Scalar>(*grad_output), column);
  }
  for (size_t i = 0; i < grads.grad_last_states.size(); ++i) {
    args.grad_last[i] = gradients_of<Scalar>(grads.grad_last_states[i], state);
  }
  if (grad_input) {
    const int64_t first = stack.sums_given ? d * stack.gate_rows() : 0;
    args.grad_input = rows_of<Scalar>(batch, *grad_input, mutable_data<Scalar>(*grad_input), first);
    args.accumulate_input = d > 0 && !stack.sums_given;
  }
  for (size_t i = 0; i < grads.grad_inputs.size(); ++i) {
    const std::optional<Tensor>& grad = grads.grad_inputs[i];
    if (!grad) continue;
    args.grad_inputs[i] = rows_of<Scalar>(batch, *grad, mutable_data<Scalar>(*grad),
                                          state * stack.features_beside(i));
  }
  for (size_t i = 0; i < grads.grad_states.size(); ++i) {
    args.grad_initial[i] =
        mutable_data<Scalar>(grads.grad_states[i]) + state * batch.B * stack.size_of_state(i);
  }
  for (size_t i = 0; i < grads.grad_reset_to.size(); ++i) {
    const Tensor& grad = grads.grad_reset_to[i];
    args.grad_reset_to[i] = restart_states<Scalar>(grad, mutable_data<Scalar>(grad), state);
  }
  if (grads.want_weights[size_t(k)]) {
    set_weight_gradients(stack, &grads.grad_weights[stack.first_weight(state)], args);
  }
  return args;
}

// Returns the lowest layer that the backward pass must run. Lower layers need no gradients.
int64_t lowest_layer(const BackwardTensors& grads) {
  const auto& beside = grads.grad_inputs;
  const bool wants_all = grads.grad_input || !grads.grad_states.empty() ||
                         !grads.grad_reset_to.empty() ||
                         std::any_of(std::begin(beside), std::end(beside),
                                     [](const auto& grad) { return grad.has_value(); });
  if (wants_all) return 0;
  return std::find(grads.want_weights.begin(), grads.want_weights.end(), true) -
         grads.want_weights.begin();
}

// Copies the gradient of sequence b's last state to `to`, or writes zeros if of_last.data is null.
template <class Scalar>
void copy_gradients(const StateGradients<Scalar>& of_last, int64_t b, int64_t size, Scalar* to) {
  for (int64_t j = 0; j < size; ++j) {
    to[j] = of_last.data ? of_last.data[b * of_last.stride + j * of_last.feature_stride] : Scalar();
  }
}

// Runs consecutive layers concurrently, one thread per layer. A layer's stretches run from last to
// first and pass on the gradients of their initial states in `grad_initial`. Until the stretch in
// which a sequence ends, `grad_initial` holds the gradient of the sequence's last state.
template <class Scalar>
void run_backward_wave(const Stack& stack, const Wave& wave, const BackwardTensors& grads) {
  const KernelsFor<Scalar>& kernels = kernels_in<Scalar>();
  const int64_t lowest = lowest_layer(grads);
  const int64_t layers = stack.layers - lowest;
  const Stretches stretches(stack.batch.layout, wave.steps);
  // Element k is the gradient of layer k's input. The last element is the gradient of the output.
  std::vector<std::optional<Tensor>> grad_rows(size_t(stack.layers + 1));
  grad_rows[size_t(stack.layers)] = grads.grad_output;
  for (int64_t k = stack.layers; --k > lowest;) {
    grad_rows[size_t(k)] = empty_rows(stack.batch, stack.P, stack.dtype);
  }
  grad_rows[size_t(lowest)] = grads.grad_input;
  // Holds the gradients that stretches pass on if no gradients of initial states are requested.
  std::vector<std::vector<Tensor>> grad_states(size_t(stack.layers));
  std::vector<std::optional<Tensor>> panels(size_t(stack.layers));
  run_wave(std::min(wave.layers, layers), layers, stretches.count(), [&](int64_t n, int64_t i) {
    const int64_t k = stack.layers - 1 - n;
    Backward<Scalar> args =
        backward_of<Scalar>(stack, grads, k, 0, grad_rows[size_t(k + 1)], grad_rows[size_t(k)]);
    if (i == 0) {
      panels[size_t(k)] = panels_for(kernels.backward_panels, args.layer);
      for (size_t s = 0; grads.grad_states.empty() && s < stack.state_count(); ++s) {
        const int64_t size = stack.batch.B * stack.size_of_state(s);
        grad_states[size_t(k)].push_back(empty({size}, stack.dtype));
      }
    }
    args.layer.panels = mutable_data<char>(*panels[size_t(k)]);
    for (size_t s = 0; s < stack.state_count(); ++s) {
      Scalar*& carried = args.grad_initial[s];
      if (!carried) carried = mutable_data<Scalar>(grad_states[size_t(k)][s]);
      const int64_t size = stack.size_of_state(s);
      for (int64_t b = 0; i == 0 && b < stack.batch.B; ++b) {
        copy_gradients(args.grad_last[s], b, size, carried + b * size);
      }
      args.grad_last[s] = {carried, size, 1};
    }
    args.accumulate_weights = i > 0;
    const int64_t stretch = stretches.count() - 1 - i;
    stretches.select(stretch, args.layer, args.output);
    for (size_t s = 1; stretch > 0 && s < stack.state_count(); ++s) {
      const auto states = states_in(args.kept, *stack.cell, int64_t(s), stack.H);
      args.layer.initial[s] = {stretches.row(states, stretch * wave.steps - 1).data,
                               states.row_stride};
    }
    args.output = stretches.from(stretch, args.output);
    args.kept = stretches.from(stretch, args.kept);
    args.grad_output = stretches.from(stretch, args.grad_output);
    args.grad_input = stretches.from(stretch, args.grad_input);
    for (auto& rows : args.grad_inputs) rows = stretches.from(stretch, rows);
    for (auto& states : args.grad_reset_to) states = stretches.from(stretch, states);
    kernels.backward(args, Resources(one_thread()).runtime());
  });
}

// Runs all layers backward, several concurrently if that is estimated to be faster.
template <class Scalar>
void run_backward(const Stack& stack, const BackwardTensors& grads) {
  if constexpr (std::is_floating_point_v<Scalar>) {
    const Wave wave = wave_of(stack, Pass::backward);
    if (wave.layers > 1 && lowest_layer(grads) < stack.layers - 1) {
      return run_backward_wave<Scalar>(stack, wave, grads);
    }
  }
  const int64_t lowest = lowest_layer(grads);
  Segment segments[2];  // memory for gradients that only the next lower layer reads
  std::optional<Tensor> grad_output = grads.grad_output;
  for (int64_t k = stack.layers; k-- > lowest;) {
    const int64_t D = stack.input_size(k);
    std::optional<Tensor> grad_input = grads.grad_input;
    if (k > lowest) grad_input = empty_rows_in(segments[k % 2], stack.batch, D, stack.dtype);
    run_directions(stack, D, !grad_input, [&](int64_t d, const Resources& resources) {
      kernels_for<Scalar>(stack).backward(
          backward_of<Scalar>(stack, grads, k, d, grad_output, grad_input), resources.runtime());
    });
    grad_output = grad_input;
  }
}

// Writes the gradients that no kernel writes: of padding rows, of the initial states of sequences
// without rows, and of bias_hh if both biases have the same gradient.
template <class Scalar>
void finish_backward(const Stack& stack, const BackwardTensors& grads) {
  if (grads.grad_input) clear_padding(stack.batch, *grads.grad_input);
  for (const auto& grad : grads.grad_inputs) {
    if (grad) clear_padding(stack.batch, *grad);
  }
  for (size_t i = 0; i < grads.grad_states.size(); ++i) {
    const int64_t size = stack.size_of_state(i);
    for_each_idle_state(stack, [&](int64_t state, int64_t b) {
      copy_gradients(
          gradients_of<Scalar>(grads.grad_last_states[i], state), b, size,
          mutable_data<Scalar>(grads.grad_states[i]) + (state * stack.batch.B + b) * size);
    });
  }
  const size_t count = size_t(stack.parameters.count);
  for (size_t i = 0; i < grads.grad_weights.size() && stack.cell->one_bias_gradient; ++i) {
    if (stack.parameters.roles[i % count] != kBiasHh) continue;
    if (!grads.want_weights[i / count / size_t(stack.directions)]) continue;
    std::copy_n(const_data<Scalar>(grads.grad_weights[i - 1]), stack.gate_rows(),
                mutable_data<Scalar>(grads.grad_weights[i]));
  }
}

}  // namespace

void backward_stack(const Stack& stack, const Options& options, BackwardTensors& grads) {
  const std::optional<PrefixTrees> trees = trees_of(stack, options);
  if (options.share_prefixes && !trees) {  // the forward pass did not share prefixes
    for (Tensor& output : grads.outputs) output = with_rows_of(stack.batch, output);
    for (Tensor& kept : grads.kept) kept = with_rows_of(stack.batch, kept);
  }
  with_storage(stack.dtype, [&](auto storage) {
    using Scalar = decltype(storage);
    if (trees) {
      backward_trees(stack, *trees, grads);
    } else if (!stack.is_empty()) {
      run_backward<Scalar>(stack, grads);
    } else {
      const auto clear = [](const Tensor& grad) {
        std::fill_n(mutable_data<Scalar>(grad), grad.numel(), Scalar());
      };
      for (const Tensor& grad : grads.grad_weights) clear(grad);
      if (grads.grad_input) clear(*grads.grad_input);
      for (const auto& grad : grads.grad_inputs) {
        if (grad) clear(*grad);
      }
    }
    finish_backward<Scalar>(stack, grads);
  });
}

}  // namespace namernn_fast
