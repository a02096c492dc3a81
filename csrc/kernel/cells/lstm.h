// The long short-term memory, as torch defines it. Besides its output h, a row has a cell state c,
// which the next step reads without a product.
//   i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
//   f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
//   g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
//   o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t), or W_hr (o tanh(c_t)) in a layer that projects h
// torch stores the weight blocks in the order i, f, g, o.
#pragma once

#include "kernel/cells/cell.h"

namespace namernn_fast {
namespace {

struct Lstm : CellDefaults {
  static constexpr CellKind kind = CellKind::lstm;
  static constexpr const char* name = "LSTM";
  static constexpr int64_t weight_blocks = 4;
  static constexpr int64_t sums = 4;  // i, f, g and o; input and state contribute to every sum
  static constexpr int64_t first_state_sum = 0;
  static constexpr int64_t input_block(int64_t sum) { return sum; }
  static constexpr int64_t kept = 5;  // i, f, g, o and c
  static constexpr int states = 2;
  static constexpr bool only_through_sums = true;
  static constexpr bool can_project = true;

  template <class Storage>
  explicit Lstm(const Layer<Storage>&) {}

  template <class Scalar, class Storage>
  void states_of(const StateRow<Scalar, Storage>& row) const {
    const int64_t stride = row.stride, H = row.H;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      const V i = sigmoid<Scalar>(load_upto(row.sums + j, lanes));
      const V f = sigmoid<Scalar>(load_upto(row.sums + stride + j, lanes));
      const V g = tanh<Scalar>(load_upto(row.sums + 2 * stride + j, lanes));
      const V o = sigmoid<Scalar>(load_upto(row.sums + 3 * stride + j, lanes));
      const V c_previous = load_state<Scalar>(row.previous[1], j, lanes);
      const V c = f * c_previous + i * g;
      store_upto(row.states[1] + j, c, lanes);
      store_upto(row.states[0] + j, o * tanh<Scalar>(c), lanes);
      if (!row.kept) return;
      store_upto(row.kept + j, i, lanes);
      store_upto(row.kept + H + j, f, lanes);
      store_upto(row.kept + 2 * H + j, g, lanes);
      store_upto(row.kept + 3 * H + j, o, lanes);
      store_upto(row.kept + 4 * H + j, c, lanes);
    });
  }

  template <class Storage, class Scalar, class Elements>
  void sum_gradients(const GradientRow<Storage, Scalar, Elements>& row) const {
    const int64_t stride = row.stride, H = row.H;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      constexpr Scalar one = Scalar(1);
      const V grad = load_gradient(row, j, lanes);
      const V i = load_upto(row.kept + j, lanes);
      const V f = load_upto(row.kept + H + j, lanes);
      const V g = load_upto(row.kept + 2 * H + j, lanes);
      const V o = load_upto(row.kept + 3 * H + j, lanes);
      const V t = tanh<Scalar>(load_upto(row.kept + 4 * H + j, lanes));
      const V c_previous = load_state<Scalar>(row.previous[1], j, lanes);
      const V dc = load_upto(row.grad[1] + j, lanes) + grad * o * (one - t * t);
      store_upto(row.dz + j, dc * g * (i * (one - i)), lanes);
      store_upto(row.dz + (stride + j), dc * c_previous * (f * (one - f)), lanes);
      store_upto(row.dz + (2 * stride + j), dc * i * (one - g * g), lanes);
      store_upto(row.dz + (3 * stride + j), grad * t * (o * (one - o)), lanes);
      store_upto(row.grad_previous[1] + j, dc * f, lanes);
      if (row.unprojected) store_upto(row.unprojected + j, o * t, lanes);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
