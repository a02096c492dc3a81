#include "library/step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "library/prepared.h"
#include "library/runtime.h"
#include "library/stack.h"

namespace namernn_fast {
namespace {

std::vector<int64_t> shape_of(const View& view) { return {view.sizes, view.sizes + view.dim}; }

void check_shape(const char* name, const View& view, int32_t dtype,
                 const std::vector<int64_t>& shape) {
  check(
      view.dtype == dtype, name, " must have ",
      dtype == aoti_torch_dtype_int64() ? "token ids (int64)" : "the dtype of the prepared layer");
  if (shape_of(view) != shape) {
    fail(name, " must have shape ", shape_text(shape), ", got ", shape_text(shape_of(view)));
  }
}

// Where the rows of a frame are.
struct Frame {
  int64_t T;
  int64_t B;
  int64_t time_stride;
  int64_t row_stride;
  bool batch_first;
};

// Checks everything except the values of token ids and `rows`.
Frame check_frame(const Step& step, const Stack& stack, const Options& options) {
  const View& frame = step.frame;
  const int64_t dims = frame.dim - !stack.has_ids;  // without features
  check(dims == 1 || dims == 2, "frame must have ", 1 + !stack.has_ids, " dimensions, or ",
        2 + !stack.has_ids, " for several steps, got ", frame.dim);
  const int64_t batch_dim = dims == 2 && !options.batch_first;
  const int64_t time_dim = 1 - batch_dim;
  const bool one_step = dims == 1;
  const Frame rows{one_step ? 1 : frame.sizes[time_dim], frame.sizes[batch_dim],
                   one_step ? frame.sizes[0] * frame.strides[0] : frame.strides[time_dim],
                   frame.strides[batch_dim], !one_step && options.batch_first};
  const int64_t sequences = step.row_count < 0 ? step.states.sizes[2] : step.row_count;
  std::vector<int64_t> shape = shape_of(frame);
  shape[size_t(batch_dim)] = sequences;
  if (!stack.has_ids) shape.back() = stack.D;
  check_shape("frame", frame, stack.has_ids ? aoti_torch_dtype_int64() : stack.dtype, shape);
  check(rows.T > 0, "frame must have at least one step");
  if (stack.has_ids) shape.push_back(0);
  shape.back() = stack.H;
  check_shape("out", step.output, stack.dtype, shape);
  return rows;
}

void check_rows(const Step& step, int64_t sequences) {
  std::vector<bool> seen(size_t(step.row_count < 0 ? 0 : sequences));
  for (int64_t i = 0; i < step.row_count; ++i) {
    const int64_t row = step.rows[i];
    check(row >= 0 && row < sequences, "rows must be from 0 to ", sequences - 1, ", got ", row);
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

// Copies the states of the sequences in `rows` from the stream's states to `packed` or, if `back`,
// from `packed` to the stream's states. `count` is the number of states of a sequence.
template <class Scalar>
void copy_rows(const Step& step, int64_t count, int64_t H, Scalar* packed, bool back) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t b = 0; b < step.row_count; ++b, packed += H) {
      const int64_t row = i * step.states.sizes[2] + step.rows[b];
      Scalar* const held = reinterpret_cast<Scalar*>(step.states.data) + row * H;
      std::memcpy(back ? held : packed, back ? packed : held, size_t(H) * sizeof(Scalar));
    }
  }
}

template <class Scalar>
void step_layers(const Stack& stack, const Step& step, const Frame& frame) {
  using State = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;
  const Machine machine = this_machine();
  const Resources resources(machine);
  const auto take = [&](auto like, int64_t count) {
    return static_cast<decltype(like)*>(resources.runtime().scratch(size_t(count) * sizeof(like)));
  };
  const int64_t H = stack.H, layers = stack.layers, rows = frame.T * frame.B;
  const int64_t states = int64_t(stack.state_count());
  const int64_t each = frame.B * H;  // elements of a state of a layer
  const bool all = step.row_count < 0;
  auto* const held = reinterpret_cast<State*>(step.states.data);
  State* const next = take(State(), states * layers * each);
  State* const previous = all ? held : take(State(), states * layers * each);
  if (!all) copy_rows(step, states * layers, H, previous, false);
  Scalar* between[2] = {};  // outputs that only the next layer reads
  for (int64_t k = 0; k < std::min<int64_t>(layers - 1, 2); ++k)
    between[k] = take(Scalar(), rows * H);
  for (int64_t k = 0; k < layers; ++k) {
    Forward<Scalar> args{};
    args.layer = layer_of<Scalar>(stack, k, 0);
    if (k > 0) {
      args.layer.input = {between[(k - 1) % 2], each, H};
    } else if (stack.has_ids) {
      const auto* ids = reinterpret_cast<const int64_t*>(step.frame.data);
      args.layer.table.ids = {ids, frame.time_stride, frame.row_stride};
    } else {
      const auto* input = reinterpret_cast<const Scalar*>(step.frame.data);
      args.layer.input = {input, frame.time_stride, frame.row_stride};
    }
    args.output = {between[k % 2], each, H};
    if (k + 1 == layers) {
      auto* const output = reinterpret_cast<Scalar*>(step.output.data);
      args.output = {output, frame.batch_first ? H : each, frame.batch_first ? frame.T * H : H};
    }
    for (int64_t i = 0; i < states; ++i) {
      State* const before = previous + (i * layers + k) * each;
      State* const after = next + (i * layers + k) * each;
      if constexpr (std::is_same_v<State, Scalar>) {
        args.layer.initial[i] = {before, H};
        args.last[i] = after;
      } else {
        args.float_states.initial[i] = before;
        args.float_states.last[i] = after;
      }
    }
    kernels_for<Scalar>(stack).forward(args, Resources(machine).runtime());
  }
  if (all) {
    std::memcpy(held, next, size_t(states * layers * each) * sizeof(State));
  } else {
    copy_rows(step, states * layers, H, next, true);
  }
}

// Returns the end of a tensor's memory.
const char* end_of(const View& view) {
  int64_t last = 0;
  for (int64_t i = 0; i < view.dim; ++i) last += (view.sizes[i] - 1) * view.strides[i];
  return view.data + (last + 1) * view.element;
}

}  // namespace

bool is_simple(const Step& step) {
  const View& frame = step.frame;
  const bool ids = frame.dtype == aoti_torch_dtype_int64();
  const bool overlap = frame.data < end_of(step.output) && step.output.data < end_of(frame);
  return !overlap && frame.dim + ids == step.output.dim && is_dense(step.output) && frame.dim > 0 &&
         (ids || has_adjacent_features(frame));
}

void run_step(const Step& step, const Options& options) {
  check(!options.bidirectional, "a stream must have one direction");
  Stack stack = stack_of_prepared(step.prepared, options);
  stack.has_ids = stack.V > 0;
  check(step.states.dim == 4 && is_dense(step.states),
        "states must be contiguous, with 4 dimensions");
  const int64_t sequences = step.states.sizes[2];
  const bool is_double = stack.dtype == aoti_torch_dtype_float64();
  check_shape("states", step.states,
              is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
              {int64_t(stack.state_count()), stack.layers, sequences, stack.H});
  const Frame frame = check_frame(step, stack, options);
  check_rows(step, sequences);
  if (stack.has_ids) check_ids(step.frame, frame, stack.V);
  if (frame.B == 0) return;
  set_rows(stack, frame.T, frame.B, options);
  with_storage(stack.dtype,
               [&](auto storage) { step_layers<decltype(storage)>(stack, step, frame); });
}

}  // namespace namernn_fast
