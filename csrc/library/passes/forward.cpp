#include <algorithm>
#include <type_traits>

#include "library/passes/passes.h"
#include "library/passes/schedule.h"
#include "library/passes/tree_passes.h"

namespace namernn_fast {
namespace {

// If only the last state is requested, the last layer still writes an output of at most this size:
// computing it in time blocks, without an output, would copy states and save little memory.
constexpr int64_t kDroppedOutput = int64_t(16) << 20;  // bytes

// Returns whether the kernels of the last layer write their output.
bool writes_last_output(const Stack& stack, const Options& options) {
  if (!options.last_state) return true;
  const int64_t elements = count_tensor_rows(stack.batch) * stack.directions * stack.P;
  return elements * element_size(stack.dtype) <= kDroppedOutput;
}

// Returns a kernel's arguments for direction d of layer k.
template <class Scalar>
Forward<Scalar> forward_of(const Stack& stack, const ForwardTensors& results, int64_t k,
                           int64_t d) {
  const std::optional<Tensor>& output = results.outputs[size_t(k)];
  Forward<Scalar> args{};
  args.layer = direction_of<Scalar>(stack, k, d, k ? *results.outputs[size_t(k - 1)] : stack.input);
  if (output) {
    args.output = rows_of<Scalar>(stack.batch, *output, mutable_data<Scalar>(*output), d * stack.P);
  }
  if (!results.kept.empty()) {
    const Tensor& kept = results.kept[size_t(k)];
    args.kept =
        rows_of<Scalar>(stack.batch, kept, mutable_data<Scalar>(kept), d * stack.kept_size());
  }
  for (size_t i = 0; i < results.last_states.size(); ++i) {
    const int64_t at = stack.state_of(k, d) * stack.batch.B * stack.size_of_state(i);
    args.last[i] = mutable_data<Scalar>(results.last_states[i]) + at;
  }
  return args;
}

// Runs consecutive layers concurrently, one thread per layer. Each layer runs its stretches of
// steps in order.
template <class Scalar>
void run_forward_wave(const Stack& stack, const Wave& wave, ForwardTensors& results) {
  const KernelsFor<Scalar>& kernels = kernels_in<Scalar>();
  const Stretches stretches(stack.batch.layout, wave.steps);
  for (auto& output : results.outputs) output = empty_rows(stack.batch, stack.P, stack.dtype);
  std::vector<std::optional<Tensor>> panels(size_t(stack.layers));
  std::optional<Tensor> table;  // the first layer's table plus biases
  run_wave(wave.layers, stack.layers, stretches.count(), [&](int64_t k, int64_t i) {
    Forward<Scalar> args = forward_of<Scalar>(stack, results, k, 0);
    use_panels(kernels.forward_panels, args.layer, panels[size_t(k)]);
    use_biased_table(stack, args.layer, table);
    stretches.select(i, args.layer,
                     {args.output.data, args.output.time_stride, args.output.row_stride});
    for (size_t s = 1; i > 0 && s < stack.state_count(); ++s) {
      args.layer.initial[s] = {args.last[s], stack.H};
    }
    args.output = stretches.from(i, args.output);
    args.kept = stretches.from(i, args.kept);
    kernels.forward(args, Resources(one_thread()).runtime());
  });
}

// Runs all layers forward, several concurrently if that is estimated to be faster.
template <class Scalar>
void run_forward(const Stack& stack, const Options& options, ForwardTensors& results) {
  if constexpr (std::is_floating_point_v<Scalar>) {
    const Wave wave = wave_of(stack, Pass::forward);
    if (wave.layers > 1) return run_forward_wave<Scalar>(stack, wave, results);
  }
  const bool write_last = writes_last_output(stack, options);
  const int64_t features = stack.directions * stack.P;
  Segment segments[2];  // memory for outputs that only the next layer reads
  for (int64_t k = 0; k < stack.layers; ++k) {
    const bool last = k + 1 == stack.layers;
    if (!last && !options.want_saved) {
      results.outputs[size_t(k)] =
          empty_rows_in(segments[k % 2], stack.batch, features, stack.dtype);
    } else if (!last || write_last) {
      results.outputs[size_t(k)] = empty_rows(stack.batch, features, stack.dtype);
    }
    if (!stack.is_empty()) {
      run_directions(stack, stack.input_size(k), true, [&](int64_t d, const Resources& resources) {
        kernels_for<Scalar>(stack).forward(forward_of<Scalar>(stack, results, k, d),
                                           resources.runtime());
      });
    }
    if (k > 0 && !options.want_saved) results.outputs[size_t(k - 1)].reset();
  }
}

// Zeroes the padding of the outputs and kept values that are returned to the caller.
void finish_outputs(const Stack& stack, const Options& options, const ForwardTensors& results) {
  const size_t layers = results.outputs.size();
  for (size_t k = options.want_saved ? 0 : layers - 1; k < layers && !options.last_state; ++k) {
    clear_padding(stack.batch, *results.outputs[k]);
  }
  for (const Tensor& kept : results.kept) clear_padding(stack.batch, kept);
}

// Copies the initial states of sequences without rows to their last states, because no kernel
// handles these sequences.
template <class Scalar>
void finish_states(const Stack& stack, const ForwardTensors& results) {
  for_each_idle_state(stack, [&](int64_t state, int64_t b) {
    for (size_t i = 0; i < results.last_states.size(); ++i) {
      const int64_t size = stack.size_of_state(i);
      Scalar* last =
          mutable_data<Scalar>(results.last_states[i]) + (state * stack.batch.B + b) * size;
      if (stack.states.empty()) {
        std::fill_n(last, size, Scalar());
      } else {
        const Tensor& initial = stack.states[i];
        const int64_t at = state * initial.stride(0) + b * initial.stride(1);
        std::copy_n(const_data<Scalar>(initial) + at, size, last);
      }
    }
  });
}

}  // namespace

ForwardTensors forward_stack(const Stack& stack, const Options& options) {
  ForwardTensors results;
  results.outputs.resize(size_t(stack.layers));
  for (size_t i = 0; i < stack.state_count(); ++i) {
    results.last_states.push_back(empty(stack.state_shape(i), stack.dtype));
  }
  const bool keeps = options.want_saved && stack.keeps();
  const std::optional<PrefixTrees> trees = trees_of(stack, options);
  if (trees) {
    for (std::optional<Tensor>& output : results.outputs) {
      if (!options.last_state) output = empty({stack.input.numel(), stack.H}, stack.dtype);
    }
    for (int64_t k = 0; keeps && k < stack.layers; ++k) {
      results.kept.push_back(empty({stack.input.numel(), stack.kept_size()}, stack.dtype));
    }
    forward_trees(stack, *trees, results);
  }
  with_storage(stack.dtype, [&](auto storage) {
    using Scalar = decltype(storage);
    if (!trees) {
      for (int64_t k = 0; keeps && k < stack.layers; ++k) {
        results.kept.push_back(
            empty_rows(stack.batch, stack.directions * stack.kept_size(), stack.dtype));
      }
      run_forward<Scalar>(stack, options, results);
      finish_outputs(stack, options, results);
    }
    finish_states<Scalar>(stack, results);
  });
  return results;
}

}  // namespace namernn_fast
