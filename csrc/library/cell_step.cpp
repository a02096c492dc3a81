#include "library/cell_step.h"

#include <algorithm>
#include <initializer_list>

#include "library/prepared.h"
#include "library/runtime.h"
#include "library/stack.h"

namespace namernn_fast {
namespace {

// Returns whether a tensor has this dtype and shape, and adjacent elements in each row.
bool fits(const View& view, int32_t dtype, std::initializer_list<int64_t> shape) {
  return view.dtype == dtype && view.dim == int64_t(shape.size()) &&
         std::equal(shape.begin(), shape.end(), view.sizes) && has_adjacent_features(view);
}

// Returns a Stack of the layer, for a batch of n rows.
Stack stack_of(const CellStep& step, int64_t n, const Options& options) {
  const View* weights = step.weights;
  Stack stack = step.weight_count == 1
                    ? stack_of_prepared(weights[0], options)
                    : check_layers(step.cell, {1, weights[0].sizes[1], weights[1].sizes[1], 0},
                                   step.input.dtype, options);
  set_rows(stack, 1, n, options);
  return stack;
}

bool all_fit(const CellStep& step, const Stack& stack) {
  const int64_t n = step.input.sizes[0], D = stack.D, H = stack.H, rows = stack.gate_rows();
  const int32_t dtype = stack.dtype;
  const int64_t states = int64_t(stack.state_count());
  bool fit = step.cell == stack.cell && stack.layers == 1 && stack.V == 0 && n > 0 && D > 0 &&
             H > 0 && fits(step.input, dtype, {n, D}) && step.last_count == states &&
             (step.initial_count == states || step.initial_count == 0);
  for (int64_t i = 0; i < step.initial_count; ++i) fit &= fits(step.initial[i], dtype, {n, H});
  for (int64_t i = 0; i < step.last_count; ++i) {
    fit &= fits(step.last[i], dtype, {n, H}) && is_dense(step.last[i]);
  }
  if (stack.prepared) return fit;
  fit &= step.weight_count == stack.per_direction && fits(step.weights[0], dtype, {rows, D}) &&
         fits(step.weights[1], dtype, {rows, H});
  for (int64_t i = 0; i < step.weight_count; ++i) {
    fit &= is_dense(step.weights[i]) && (i < 2 || fits(step.weights[i], dtype, {rows}));
  }
  return fit;
}

template <class Scalar>
void run_cell(const CellStep& step, Stack& stack) {
  const auto data = [](const View& view) { return reinterpret_cast<Scalar*>(view.data); };
  Forward<Scalar> args{};
  Layer<Scalar>& layer = args.layer;
  layer = layer_of<Scalar>(stack, 0, 0);
  layer.input = {data(step.input), 0, step.input.strides[0]};
  if (!stack.prepared) {
    layer.weight_ih = data(step.weights[0]);
    layer.weight_hh = data(step.weights[1]);
    layer.bias_ih = step.weight_count == 4 ? data(step.weights[2]) : nullptr;
    layer.bias_hh = step.weight_count == 4 ? data(step.weights[3]) : nullptr;
  }
  for (int64_t i = 0; i < step.last_count; ++i) {
    if (step.initial_count) {
      layer.initial[i] = {data(step.initial[i]), step.initial[i].strides[0]};
    }
    args.last[i] = data(step.last[i]);
  }
  const Resources resources(this_machine());
  const Runtime runtime = resources.runtime();
  const size_t bytes = size_t(layer.layout.B * layer.H) * sizeof(Scalar);
  args.output = {static_cast<Scalar*>(runtime.scratch(bytes)), 0, layer.H};
  kernels_for<Scalar>(stack).forward(args, runtime);
}

}  // namespace

bool run_cell_step(const CellStep& step, const Options& options) {
  const View* weights = step.weights;
  const bool prepared = step.weight_count == 1;
  if (step.input.dim != 2 || (!prepared && (weights[0].dim != 2 || weights[1].dim != 2)))
    return false;
  Stack stack = stack_of(step, step.input.sizes[0], options);
  if (!all_fit(step, stack)) return false;
  with_storage(stack.dtype, [&](auto storage) { run_cell<decltype(storage)>(step, stack); });
  return true;
}

}  // namespace namernn_fast
