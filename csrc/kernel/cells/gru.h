// The gated recurrent unit, as torch defines it: the reset gate r scales n_h, which includes the
// bias b_hn.
//   r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
//   z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
//   n = tanh(n_x + r n_h),  n_x = W_in x_t + b_in,  n_h = W_hn h_{t-1} + b_hn
//   h_t = n + z (h_{t-1} - n)
// torch stores the weight blocks in the order r, z, n.
#pragma once

#include "kernel/cells/cell.h"

namespace namernn_fast {
namespace {

struct Gru : CellDefaults {
  static constexpr CellKind kind = CellKind::gru;
  static constexpr const char* name = "GRU";
  static constexpr int64_t weight_blocks = 3;
  // The sums are n_x, r, z and n_h, in this order, so that the sums of the input are adjacent, and
  // the sums of the state are adjacent and in the order of the blocks of weight_hh.
  static constexpr int64_t sums = 4;
  static constexpr int64_t first_state_sum = 1;
  static constexpr int64_t input_block(int64_t sum) { return sum == 0 ? 2 : sum - 1; }
  // A row keeps n, r, z and n_h, in the order of the sums, with n instead of n_x.
  static constexpr int64_t kept = 4;
  static constexpr int states = 1;
  static constexpr bool only_through_sums = false;  // h_t also has the term z h_{t-1}
  // The gradient of b_in is the sum of dz of n_x, but the gradient of b_hn is the sum of dz of n_h.
  static constexpr bool one_bias_gradient = false;

  template <class Storage>
  explicit Gru(const Layer<Storage>&) {}

  template <class Scalar, class Storage>
  void states_of(const StateRow<Scalar, Storage>& row) const {
    const int64_t stride = row.stride, H = row.H;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      const V r = sigmoid<Scalar>(load_upto(row.sums + stride + j, lanes));
      const V z = sigmoid<Scalar>(load_upto(row.sums + 2 * stride + j, lanes));
      const V n_h = load_upto(row.sums + 3 * stride + j, lanes);
      const V n = tanh<Scalar>(load_upto(row.sums + j, lanes) + r * n_h);
      const V h_previous = load_state<Scalar>(row.previous[0], j, lanes);
      store_upto(row.states[0] + j, n + z * (h_previous - n), lanes);
      if (!row.kept) return;
      store_upto(row.kept + j, n, lanes);
      store_upto(row.kept + H + j, r, lanes);
      store_upto(row.kept + 2 * H + j, z, lanes);
      store_upto(row.kept + 3 * H + j, n_h, lanes);
    });
  }

  template <class Storage, class Scalar, class Elements>
  void sum_gradients(const GradientRow<Storage, Scalar, Elements>& row) const {
    const int64_t stride = row.stride, H = row.H;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      constexpr Scalar one = Scalar(1);
      const V grad = load_gradient(row, j, lanes);
      const V n = load_upto(row.kept + j, lanes);
      const V r = load_upto(row.kept + H + j, lanes);
      const V z = load_upto(row.kept + 2 * H + j, lanes);
      const V n_h = load_upto(row.kept + 3 * H + j, lanes);
      const V h_previous = load_state<Scalar>(row.previous[0], j, lanes);
      const V dn = grad * (one - z) * (one - n * n);
      store_upto(row.dz + j, dn, lanes);
      store_upto(row.dz + (stride + j), dn * n_h * (r * (one - r)), lanes);
      store_upto(row.dz + (2 * stride + j), grad * (h_previous - n) * (z * (one - z)), lanes);
      store_upto(row.dz + (3 * stride + j), dn * r, lanes);
      store_upto(row.grad_previous[0] + j, grad * z, lanes);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
