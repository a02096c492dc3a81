// Computes the states of a part of the forward pass, for layers that compute the sums in the output
// rows and then overwrite the sums with the states.
#pragma once

#include "kernel/forward/forward_part.h"

namespace namernn_fast {
namespace {

template <class Scalar, class Storage, class Element>
struct OutputSums : ForwardContext<Scalar, Storage, Element> {
  using Context = ForwardContext<Scalar, Storage, Element>;
  using Context::args, Context::weights, Context::part, Context::projected_steps;
  using Context::projection, Context::recurrence, Context::look_up, Context::prefetch_rows;

  // Writes the projection of the inputs plus the biases to the output rows of projected_steps
  // steps, starting at step s.
  void project(int64_t s) const {
    const Layer<Scalar>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    this->for_each_projected_run(s, is_flat(args.output, layout), [&](const Run& run) {
      const Scalar* x = input_row(layer, run.t, run.b);
      const int64_t stride = run_stride(layer.input, run);
      const Target<Scalar> target{row_at(args.output, layout, run.t, run.b),
                                  run_stride(args.output, run), weights.bias, 0, false};
      const auto [first, last] = part.columns;
      if (weights.weight_ih) {
        const OperandInPlace<Scalar, Storage> operand{x, stride, weights.weight_ih, layer.D};
        product_in_place(operand, target, run.rows, first, last, NoFinish());
      } else {
        const Operand<Scalar, Element> operand = projection(x, stride);
        product<Scalar>(&operand, 1, target, run.rows, first, last, NoFinish());
      }
    });
  }

  // Computes the states of sequences begin .. end at time t. `h` points to the previous h of the
  // first sequence; if `h` is null, all previous states are zeros.
  void advance(int64_t t, int64_t begin, int64_t end, const Scalar* h, int64_t h_stride) const {
    const Layer<Scalar>& layer = args.layer;
    Scalar* out = row_at(args.output, layer.layout, t, begin);
    const int64_t out_stride = args.output.row_stride;
    Target<Scalar> target{out, out_stride, projected_steps ? out : weights.bias,
                          projected_steps ? out_stride : 0, false};
    if (has_table(layer)) target.starts = look_up(t, begin, end);
    const CellCode<Scalar>& code = *layer.cell;
    StateRows<Scalar> states = this->state_rows(t, begin, !h);
    const auto finish = [&](int64_t i, int64_t j, int64_t rows, int64_t width) {
      states.range = {i, rows, j, width};
      states.sums = {out + i * out_stride + j, out_stride};
      code.states_of(states);
      if (prefetch_rows) prefetch_next(t, begin + i, rows, j, width);
    };
    const auto [first, last] = part.columns;
    // Zero times infinity is NaN, so a zero state skips the product only if weight_hh is finite.
    if (!h && !weights.finite) h = weights.zeros, h_stride = 0;
    if (weights.weight_hh) {
      const OperandInPlace<Scalar, Storage> operand{h, h_stride, weights.weight_hh, layer.P};
      return product_in_place(operand, target, end - begin, first, last, finish);
    }
    Operand<Scalar, Element> operands[2];
    int count = 0;
    if (!projected_steps && !has_table(layer)) {
      operands[count++] = projection(input_row(layer, t, begin), layer.input.row_stride);
    }
    if (h) operands[count++] = recurrence(h, h_stride);
    product<Scalar>(operands, count, target, end - begin, first, last, finish);
  }

 private:
  // Prefetches units j .. j + width of the output rows that the step after time t will write, and
  // as large a part of the inputs that it will read, for `rows` rows that start at sequence b.
  void prefetch_next(int64_t t, int64_t b, int64_t rows, int64_t j, int64_t width) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t next = time_after(layer, t);
    if (next < 0 || next >= layer.layout.T) return;
    const int64_t D = layer.D, H = layer.H;
    for (int64_t r = b; r < b + rows; ++r) {
      prefetch_elements(row_at(args.output, layer.layout, next, r), j, j + width);
      if (layer.input.data && !projected_steps) {
        prefetch_elements(input_row(layer, next, r), j * D / H, (j + width) * D / H);
      }
    }
  }
  static void prefetch_elements(const Scalar* row, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kCacheLine / int64_t(sizeof(Scalar))) {
      __builtin_prefetch(row + i, 1, 2);
    }
  }
};

}  // namespace
}  // namespace namernn_fast
