// The long short-term memory, as torch defines it: besides its output h, a row has a cell state c,
// which reaches the next step without a product.
//   i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
//   f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
//   g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
//   o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t)
// torch stores the weight blocks in the order i, f, g, o. See elman.h for what a cell provides.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

struct Lstm {
  static constexpr int64_t weight_blocks = 4;
  static constexpr int64_t sums = 4;  // i, f, g and o, each of the input and of the state
  static constexpr int64_t first_state_sum = 0;
  static constexpr int64_t input_block(int64_t sum) { return sum; }
  static constexpr bool sums_in_output = false;
  static constexpr int64_t kept = 5;  // i, f, g, o and c
  static constexpr bool only_through_sums = true;
  static constexpr bool one_bias_gradient = true;
  static constexpr bool has_cell_state = true;

  template <class Storage>
  explicit Lstm(const Layer<Storage>&) {}

  // Computes cell states `c` and states `h` from sums and from the cell states before, for `width`
  // units of a row. Blocks of `sums` are `stride` apart, those of `kept` H. A null `before` stands
  // for zeros; it may be `c`, and `h` the first block of `sums`. A null `kept`: nothing is kept.
  template <class Scalar, class Storage>
  void states(const Scalar* sums, int64_t stride, const Scalar* before, Scalar* c, Scalar* h,
              Storage* kept, int64_t H, int64_t width) const {
    for_each_vector<Scalar>(width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      const V i = sigmoid<Scalar>(load_upto(sums + j, lanes));
      const V f = sigmoid<Scalar>(load_upto(sums + stride + j, lanes));
      const V g = tanh<Scalar>(load_upto(sums + 2 * stride + j, lanes));
      const V o = sigmoid<Scalar>(load_upto(sums + 3 * stride + j, lanes));
      const V was = before ? load_upto(before + j, lanes) : V{};
      const V is = f * was + i * g;
      store_upto(c + j, is, lanes);
      store_upto(h + j, o * tanh<Scalar>(is), lanes);
      if (!kept) return;
      store_upto(kept + j, i, lanes);
      store_upto(kept + H + j, f, lanes);
      store_upto(kept + 2 * H + j, g, lanes);
      store_upto(kept + 3 * H + j, o, lanes);
      store_upto(kept + 4 * H + j, is, lanes);
    });
  }

  // Computes gradients of sums `dz` from the gradient of the state, grad_h + grad_output, and that
  // of the cell state, for `width` units of a row, and writes the gradient of the cell state before
  // to `grad_before`, which may be `grad_c`. Blocks of `dz` are `stride` apart, those of `kept` H.
  // Null pointers stand for zeros.
  template <class Storage, class Scalar, class Element>
  void sum_gradients(const Storage* kept, const Storage* before, const Scalar* grad_h,
                     const Scalar* grad_c, const Storage* grad_output, Element* dz, int64_t stride,
                     Scalar* grad_before, int64_t H, int64_t width) const {
    for_each_vector<Scalar>(width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      constexpr Scalar one = Scalar(1);
      V grad = load_upto(grad_h + j, lanes);
      if (grad_output) grad += load_upto(grad_output + j, lanes);
      const V i = load_upto(kept + j, lanes);
      const V f = load_upto(kept + H + j, lanes);
      const V g = load_upto(kept + 2 * H + j, lanes);
      const V o = load_upto(kept + 3 * H + j, lanes);
      const V t = tanh<Scalar>(load_upto(kept + 4 * H + j, lanes));
      const V was = before ? load_upto(before + j, lanes) : V{};
      const V dc = load_upto(grad_c + j, lanes) + grad * o * (one - t * t);
      store_upto(dz + j, dc * g * (i * (one - i)), lanes);
      store_upto(dz + stride + j, dc * was * (f * (one - f)), lanes);
      store_upto(dz + 2 * stride + j, dc * i * (one - g * g), lanes);
      store_upto(dz + 3 * stride + j, grad * t * (o * (one - o)), lanes);
      store_upto(grad_before + j, dc * f, lanes);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
