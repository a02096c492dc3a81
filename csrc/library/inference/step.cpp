#include "library/inference/step.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "library/arguments/stack.h"
#include "library/base/runtime.h"
#include "library/inference/prepared.h"

namespace namernn_fast {
namespace {

int64_t last_size(const View& view) { return view.dim > 0 ? view.sizes[view.dim - 1] : 0; }

std::vector<int64_t> shape_of(const View& view) { return {view.sizes, view.sizes + view.dim}; }

void check_shape(const char* name, const View& view, int32_t dtype,
                 const std::vector<int64_t>& shape) {
  check(view.dtype == dtype, name, " must have ",
        dtype == aoti_torch_dtype_int64() ? "token ids (int64)" : "the dtype of the layer");
  if (view.dim != int64_t(shape.size()) || !std::equal(shape.begin(), shape.end(), view.sizes)) {
    fail(name, " must have shape ", shape_text(shape), ", got ", shape_text(shape_of(view)));
  }
}

// Returns the Stack that describes a step or a backward step, with its batch unset.
template <class AnyStep>
Stack stack_of(const AnyStep& step, const Options& options) {
  const View* weights = step.weights;
  // A layer may also have a single weight, which is a matrix.
  const bool is_prepared = step.weight_count == 1 && weights[0].dim != 2;
  if (is_prepared) return stack_of_prepared(*step.cell, weights[0], options);
  const bool recurs = step.cell->has_weight_hh;
  const View &ih = weights[kWeightIh], &hh = weights[recurs ? kWeightHh : kWeightIh];
  check(step.weight_count >= 1 + recurs && ih.dim == 2 && hh.dim == 2,
        "weights must be prepared, or the weights of one layer");
  check(!options.int8, "options must not set INT8 without prepared weights");
  const int64_t H = hh.sizes[0] / step.cell->gates;
  const Sizes sizes{1, ih.sizes[1], H, 0, H, heads_of(*step.cell, H, hh.sizes[1])};
  Stack stack = check_layers(*step.cell, sizes, ih.dtype, options);
  check(step.weight_count == stack.parameters.count, "weights must hold ", stack.parameters.count,
        " tensors, got ", step.weight_count);
  for (const Parameter p : stack.parameters) {
    check_shape(name_of(*stack.cell, p), *weights, stack.dtype, stack.shape_of(p, 0));
    check(is_dense(*weights++), "weights must be contiguous");
  }
  return stack;
}

// Checks the states and returns the number of sequences.
int64_t check_states(const Step& step, const Stack& stack) {
  check(step.last_count == int64_t(stack.state_count()) &&
            (step.state_count == 0 || step.state_count == step.last_count),
        "states must hold ", stack.state_count(), " tensor(s), one for each state of the cell");
  const View& first = step.last[0];
  const bool of_stream = step.is_of_stream;
  check(first.dim == 2 + of_stream && (of_stream || stack.layers == 1), "states must have ",
        2 + of_stream, " dimensions, got ", first.dim);
  const int64_t sequences = first.sizes[of_stream];
  std::vector<int64_t> shape{stack.layers, sequences, 0};
  if (!of_stream) shape.erase(shape.begin());
  const bool floats = of_stream && stack.dtype != aoti_torch_dtype_float64();
  const int32_t dtype = floats ? aoti_torch_dtype_float32() : stack.dtype;
  for (int64_t i = 0; i < step.last_count; ++i) {
    shape.back() = stack.size_of_state(size_t(i));
    check_shape("a state", step.last[i], dtype, shape);
    check(is_dense(step.last[i]), "last states must be contiguous");
    if (step.state_count == 0) continue;
    check_shape("a state", step.states[i], dtype, shape);
    check(of_stream ? is_dense(step.states[i]) : has_adjacent_features(step.states[i]),
          "states must be contiguous");
  }
  return sequences;
}

// The sizes and strides of a frame.
struct Frame {
  int64_t T;
  int64_t B;
  int64_t time_stride;
  int64_t row_stride;
  bool batch_first;
};

// Returns the time stride and the batch stride of `rows`. With `one_step`, `rows` has no time
// dimension.
std::pair<int64_t, int64_t> strides_of(const View& rows, bool one_step, bool batch_first) {
  if (one_step) return {0, rows.strides[0]};
  return {rows.strides[batch_first], rows.strides[!batch_first]};
}

// Checks the frame, the inputs and the output of a step, but not the values of token ids.
Frame check_frame(const Step& step, const Stack& stack, int64_t sequences, const Options& options) {
  const View& frame = step.frame;
  const int64_t dims = frame.dim - !stack.has_ids;  // without the feature dimension
  check(dims == 1 || dims == 2, "frame must have ", 1 + !stack.has_ids, " dimensions, or ",
        2 + !stack.has_ids, " for several steps, got ", frame.dim);
  const bool one_step = dims == 1;
  const int64_t batch_dim = !one_step && !options.batch_first;
  const int64_t time_dim = 1 - batch_dim;
  const bool batch_first = !one_step && options.batch_first;
  const auto [time_stride, row_stride] = strides_of(frame, one_step, batch_first);
  Frame rows{one_step ? 1 : frame.sizes[time_dim], frame.sizes[batch_dim], time_stride, row_stride,
             batch_first};
  if (!one_step && rows.B == 1) rows.row_stride = rows.time_stride;  // see rows_of()
  std::vector<int64_t> shape = shape_of(frame);
  shape[size_t(batch_dim)] = sequences;
  if (!stack.has_ids) shape.back() = stack.input_features();
  check_shape("frame", frame, stack.has_ids ? aoti_torch_dtype_int64() : stack.dtype, shape);
  check(rows.T > 0, "frame must have at least one step");
  if (stack.has_ids) shape.push_back(0);
  for (int i = 0; i < kMostInputs; ++i) {
    if (!step.inputs[i].data) continue;
    const View& beside = step.inputs[i];
    check(i < stack.cell->inputs, "inputs must hold ", stack.cell->inputs, " tensor(s) for the ",
          stack.cell->name, " cell");
    shape.back() = stack.checked_width(size_t(i), last_size(beside));
    check_shape(stack.cell->input_names[i], beside, stack.dtype, shape);
  }
  shape.back() = stack.P;
  if (step.is_of_stream) check_shape("out", step.output, stack.dtype, shape);
  return rows;
}

// Checks what a step saves for its backward step.
template <class AnyStep>
void check_saved(const AnyStep& step, const Stack& stack, int64_t sequences) {
  check(stack.layers == 1 && !stack.has_projections() && !stack.has_ids,
        "only a layer without projections runs backward, on features");
  check_shape("saved", step.saved, stack.dtype, {sequences, stack.H + stack.kept_size()});
  check(is_dense(step.saved), "saved must be contiguous");
}

void check_rows(const Step& step, int64_t sequences) {
  std::vector<bool> seen(size_t(step.row_count < 0 ? 0 : sequences));
  for (int64_t i = 0; i < step.row_count; ++i) {
    const int64_t row = step.rows[i];
    check(row >= 0 && row < sequences, "rows must be between 0 and ", sequences - 1, ", got ", row);
    check(!seen[size_t(row)], "rows must be distinct, got ", row, " twice");
    seen[size_t(row)] = true;
  }
}

void check_ids(const View& ids, const Frame& frame, int64_t V) {
  for (int64_t t = 0; t < frame.T; ++t) {
    for (int64_t b = 0; b < frame.B; ++b) {
      const auto* data = reinterpret_cast<const int64_t*>(ids.data);
      const int64_t id = data[t * frame.time_stride + b * frame.row_stride];
      check(id >= 0 && id < V, "frame must hold token ids from 0 to ", V - 1, ", got ", id);
    }
  }
}

// Calls f(row, packed, bytes) for each row of `state` whose sequence is in the frame. `packed`
// points to the copy of `row`. If the frame has all sequences, calls f once for all rows together.
template <class F>
void for_each_row(const Step& step, const View& state, char* packed, F&& f) {
  const size_t bytes = size_t(state.sizes[state.dim - 1] * state.element);
  const int64_t sequences = state.sizes[state.dim - 2];
  const int64_t layers = step.is_of_stream ? state.sizes[0] : 1;
  if (step.row_count < 0) return f(state.data, packed, bytes * size_t(layers * sequences));
  for (int64_t k = 0; k < layers; ++k) {
    for (int64_t b = 0; b < step.row_count; ++b, packed += bytes) {
      f(state.data + size_t(k * sequences + step.rows[b]) * bytes, packed, bytes);
    }
  }
}

// Sets what layer k reads of the frame: its input, if it is the first layer, and inputs besides x.
template <class Scalar>
void set_frame(const Step& step, const Stack& stack, const Frame& frame, int64_t k,
               Layer<Scalar>& layer) {
  if (k == 0 && stack.has_ids) {
    const auto* ids = reinterpret_cast<const int64_t*>(step.frame.data);
    layer.table.ids = {ids, frame.time_stride, frame.row_stride};
  } else if (k == 0) {
    const auto* rows = reinterpret_cast<const Scalar*>(step.frame.data);
    layer.input = {rows, frame.time_stride, frame.row_stride};
  }
  for (int i = 0; i < stack.cell->inputs; ++i) {
    const View& beside = step.inputs[i];
    if (!beside.data) continue;
    const auto [time_stride, row_stride] = strides_of(beside, beside.dim == 2, frame.batch_first);
    const int64_t column = stack.column_beside(size_t(i), last_size(beside), k);
    layer.inputs[i] = {reinterpret_cast<const Scalar*>(beside.data) + column, time_stride,
                       row_stride};
  }
}

template <class Scalar>
void run_layers(const Step& step, const Stack& stack, const Frame& frame) {
  const Machine machine = this_machine();
  const Resources resources(machine);
  const Runtime runtime = resources.runtime();
  const int64_t P = stack.P, each = frame.B * P;
  const auto take = [&](int64_t elements, int64_t element) {
    return static_cast<char*>(runtime.scratch(size_t(elements * element)));
  };
  const auto rows_at = [](auto* data) { return reinterpret_cast<Scalar*>(data); };
  char* next[kMostStates] = {};      // the last states: [layers, B, P] and [layers, B, H]
  char* previous[kMostStates] = {};  // copies of states, needed if the frame lacks some sequences
  const int64_t element = step.last[0].element;
  for (int64_t i = 0; i < step.last_count; ++i) {
    const int64_t size = stack.layers * frame.B * stack.size_of_state(size_t(i));
    next[i] = take(size, element);
    if (step.row_count < 0 || !step.state_count) continue;
    previous[i] = take(size, element);
    for_each_row(step, step.states[i], previous[i],
                 [](const char* row, char* packed, size_t n) { std::memcpy(packed, row, n); });
  }
  char* outputs[2] = {};                                       // outputs of even and odd layers
  const int64_t unwritten = stack.layers - step.is_of_stream;  // layers not writing step.output
  for (int64_t k = 0; k < std::min<int64_t>(unwritten, 2); ++k) {
    outputs[k] = take(frame.T * each, sizeof(Scalar));
  }
  for (int64_t k = 0; k < stack.layers; ++k) {
    Forward<Scalar> args{};
    Layer<Scalar>& layer = args.layer;
    layer = layer_of<Scalar>(stack, k, 0);
    if (!stack.prepared) {
      const View* weight = step.weights;
      for (const Parameter p : stack.parameters) layer.parameters[p] = rows_at(weight++->data);
    }
    set_frame(step, stack, frame, k, layer);
    if (k > 0) layer.input = {rows_at(outputs[(k - 1) % 2]), each, P};
    args.output = {rows_at(outputs[k % 2]), each, P};
    if (step.saved.data) {
      const int64_t width = last_size(step.saved);
      args.output = {rows_at(step.saved.data), 0, width};
      if (stack.keeps()) args.kept = {rows_at(step.saved.data) + stack.H, 0, width};
    }
    if (k + 1 == stack.layers && step.is_of_stream) {
      const bool batch_first = frame.batch_first;
      args.output = {rows_at(step.output.data), batch_first ? P : each,
                     batch_first ? frame.T * P : P};
    }
    for (int64_t i = 0; i < step.last_count; ++i) {
      const View& state = step.states[i];
      const int64_t size = stack.size_of_state(size_t(i));
      const bool all = step.row_count < 0;
      const bool strided = step.state_count && !step.is_of_stream;
      const int64_t stride = strided ? state.strides[0] : size;
      char* from = step.state_count ? (all ? state.data : previous[i]) : nullptr;
      if (from) from += k * frame.B * stride * element;
      char* const to = next[i] + k * frame.B * size * element;
      if (step.last[0].dtype == stack.dtype) {
        layer.initial[i] = {rows_at(from), stride};
        args.last[i] = rows_at(to);
      } else {
        args.float_states.initial[i] = reinterpret_cast<float*>(from);
        args.float_states.last[i] = reinterpret_cast<float*>(to);
      }
    }
    kernels_for<Scalar>(stack).forward(args, Resources(machine).runtime());
  }
  for (int64_t i = 0; i < step.last_count; ++i) {
    for_each_row(step, step.last[i], next[i],
                 [](char* row, const char* packed, size_t n) { std::memcpy(row, packed, n); });
  }
}

// Returns the address past the last element of a tensor.
const char* end_of(const View& view) {
  uint64_t size = 1;  // unsigned, because the sum may overflow if a size is 0
  for (int64_t i = 0; i < view.dim; ++i) {
    if (view.sizes[i] == 0) return view.data;
    size += uint64_t(view.sizes[i] - 1) * uint64_t(view.strides[i]);
  }
  return view.data + size * uint64_t(view.element);
}

}  // namespace

bool is_simple(const Step& step) {
  const View &frame = step.frame, &output = step.output;
  const bool ids = frame.dtype == aoti_torch_dtype_int64();
  if (frame.dim == 0 || !(ids || has_adjacent_features(frame))) return false;
  for (const View& beside : step.inputs) {
    if (beside.data && (beside.dim == 0 || !has_adjacent_features(beside))) return false;
  }
  if (!step.is_of_stream) return frame.dim == 2;
  const auto overlaps = [&](const View& view) {
    return view.data && view.data < end_of(output) && output.data < end_of(view);
  };
  bool overlap = overlaps(frame);
  for (const View& beside : step.inputs) overlap = overlap || overlaps(beside);
  return !overlap && frame.dim + ids == output.dim && is_dense(output);
}

void run_step(const Step& step, const Options& options) {
  check(!options.bidirectional && !options.for_backward,
        "options must not set BIDIRECTIONAL or FOR_BACKWARD for a step");
  Stack stack = stack_of(step, options);
  const int64_t sequences = check_states(step, stack);
  const int64_t taking_part = step.row_count < 0 ? sequences : step.row_count;
  const Frame frame = check_frame(step, stack, taking_part, options);
  check_rows(step, sequences);
  if (step.saved.data) {
    check(!step.is_of_stream && step.row_count < 0, "a step of a stream saves nothing");
    check_saved(step, stack, sequences);
  }
  if (stack.has_ids) check_ids(step.frame, frame, stack.V);
  set_rows(stack, frame.T, frame.B, options);
  if (stack.is_empty()) return;
  with_storage(stack.dtype,
               [&](auto storage) { run_layers<decltype(storage)>(step, stack, frame); });
}

bool is_simple(const StepBack& step) {
  const auto is_matrix = [](const View& view) {
    return view.dim == 2 && view.sizes[0] > 0 && view.sizes[1] > 0;
  };
  const auto is_absent_or_fits = [&](const View& view) {
    return !view.data || (is_matrix(view) && has_adjacent_features(view));
  };
  bool simple = is_matrix(step.frame) && has_adjacent_features(step.frame);
  for (const View& state : step.states) simple = simple && is_absent_or_fits(state);
  for (const View& beside : step.inputs) simple = simple && is_absent_or_fits(beside);
  return simple && is_matrix(step.saved);
}

namespace {

// Checks a gradient that is written, if it is wanted.
void check_gradient(const char* name, const View& grad, const Stack& stack,
                    const std::vector<int64_t>& shape) {
  if (!grad.data) return;
  check_shape(name, grad, stack.dtype, shape);
  check(is_dense(grad), name, " must be contiguous");
}

// Returns whether the gradients of the weights are wanted, or of the sums if these replace them.
bool wants_gradients(const StepBack& step, const Stack& stack) {
  return (stack.prepared ? step.grad_sums : step.grad_weights[0]).data;
}

void check_step_back(const StepBack& step, const Stack& stack) {
  check(stack.layers == 1 && !stack.sums_given && stack.backward_panels == bool(stack.prepared),
        "weights must be of one layer, or prepared for the backward pass");
  const int64_t B = step.frame.sizes[0], H = stack.H;
  check_saved(step, stack, B);
  check_shape("frame", step.frame, stack.dtype, {B, stack.D});
  check_gradient("the gradient of frame", step.grad_frame, stack, {B, stack.D});
  check(step.state_count == 0 || step.state_count == int64_t(stack.state_count()),
        "states must hold ", stack.state_count(), " tensor(s), one for each state of the cell");
  for (size_t i = 0; i < stack.state_count(); ++i) {
    if (step.state_count) check_shape("a state", step.states[i], stack.dtype, {B, H});
    if (step.grad_last[i].data) {
      check_shape("the gradient of a last state", step.grad_last[i], stack.dtype, {B, H});
    }
    check_gradient("the gradient of a state", step.grad_states[i], stack, {B, H});
    check(!step.grad_states[i].data == !step.grad_states[0].data,
          "the gradients of all states or of none must be wanted");
  }
  for (int i = 0; i < kMostInputs; ++i) {
    const int64_t features = i < stack.cell->inputs ? stack.features_beside(size_t(i)) : 0;
    check(features > 0 || !step.inputs[i].data, "inputs must hold ", stack.cell->inputs,
          " tensor(s) for the ", stack.cell->name, " cell");
    if (step.inputs[i].data) check_shape("an input", step.inputs[i], stack.dtype, {B, features});
    check_gradient("the gradient of an input", step.grad_inputs[i], stack, {B, features});
  }
  check_gradient("the gradient of the sums", step.grad_sums, stack, {B, stack.cell->sums * H});
  check(stack.prepared || !step.grad_sums.data, "only prepared weights have gradients of sums");
  const View* grad = step.grad_weights;
  const bool wants_weights = wants_gradients(step, stack);
  for (const Parameter p : stack.parameters) {
    if (stack.prepared && p < kOwn) continue;
    check(!wants_weights == !grad->data, "the gradients of all weights or of none must be wanted");
    check_gradient(name_of(*stack.cell, p), *grad++, stack, stack.shape_of(p, 0));
  }
}

template <class Scalar>
void run_layer_back(const StepBack& step, const Stack& stack) {
  const auto rows_at = [](const View& view) {
    return RowStrides<Scalar>{reinterpret_cast<Scalar*>(view.data), 0,
                              view.data ? view.strides[0] : 0};
  };
  const auto read_at = [&](const View& view) {
    const RowStrides<Scalar> rows = rows_at(view);
    return RowStrides<const Scalar>{rows.data, 0, rows.row_stride};
  };
  const auto values_of = [](const View& view) { return reinterpret_cast<Scalar*>(view.data); };
  Backward<Scalar> args{};
  args.layer = layer_of<Scalar>(stack, 0, 0);
  args.layer.input = read_at(step.frame);
  args.output = args.kept = read_at(step.saved);
  args.kept.data = stack.keeps() ? args.kept.data + stack.H : nullptr;
  args.grad_input = rows_at(step.grad_frame);
  args.grad_sums = rows_at(step.grad_sums);
  for (size_t i = 0; i < stack.state_count(); ++i) {
    const View& grad = step.grad_last[i];
    args.grad_last[i] = {nullptr, 0, 1};
    if (grad.data) args.grad_last[i] = {values_of(grad), grad.strides[0], grad.strides[1]};
    if (step.state_count) {
      args.layer.initial[i] = {values_of(step.states[i]), step.states[i].strides[0]};
    }
    args.grad_initial[i] = values_of(step.grad_states[i]);
  }
  for (int i = 0; i < stack.cell->inputs; ++i) {
    args.layer.inputs[i] = read_at(step.inputs[i]);
    args.grad_inputs[i] = rows_at(step.grad_inputs[i]);
  }
  args.wants_weights = wants_gradients(step, stack);
  const View *weight = step.weights, *grad = step.grad_weights;
  Scalar* bias_hh = nullptr;  // a copy of the gradient of bias_ih
  for (const Parameter p : stack.parameters) {
    if (!stack.prepared) args.layer.parameters[p] = values_of(*weight++);
    if (stack.prepared && p < kOwn) continue;
    args.grads[p] = values_of(*grad++);
    if (p == kBiasHh && stack.cell->one_bias_gradient) {
      bias_hh = std::exchange(args.grads[p], nullptr);
    }
  }
  kernels_for<Scalar>(stack).backward(args, Resources(this_machine()).runtime());
  if (bias_hh) std::copy_n(args.grads[kBiasIh], stack.gate_rows(), bias_hh);
}

}  // namespace

void run_step_back(const StepBack& step, const Options& options) {
  check(!options.bidirectional, "a step must have one direction");
  Stack stack = stack_of(step, options);
  check_step_back(step, stack);
  set_rows(stack, 1, step.frame.sizes[0], options);
  with_storage(stack.dtype, [&](auto storage) { run_layer_back<decltype(storage)>(step, stack); });
}

}  // namespace namernn_fast
