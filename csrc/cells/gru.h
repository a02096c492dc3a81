// The gated recurrent unit, as torch defines it: the reset gate r scales n_h, which includes the
// bias b_hn.
//   r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
//   z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
//   n = tanh(n_x + r n_h),  n_x = W_in x_t + b_in,  n_h = W_hn h_{t-1} + b_hn
//   h_t = n + z (h_{t-1} - n)
// torch stores the weight blocks in the order r, z, n.
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

struct Gru : NothingOwned {
  static constexpr CellKind kind = CellKind::gru;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "GRU";
    cell.gates = 3;
    // The sums are n_x, r, z and n_h, in this order. The input contributes to the first three and
    // the state to the last three. weight_hh has its blocks in the order r, z, n_h.
    cell.sums = 4;
    cell.first_state_sum = 1;
    cell.input_block[0] = 2, cell.input_block[1] = 0, cell.input_block[2] = 1;
    cell.kept = 4;  // n, r, z and n_h: the order of the sums, with n instead of n_x
    cell.only_through_sums = false;  // h_t also contains the term z h_{t-1}
    // The gradient of b_in sums the gradients of n_x, but the gradient of b_hn sums the gradients
    // of n_h.
    cell.one_bias_gradient = false;
    return cell;
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    const V r = sigmoid<Scalar>(load_sum(rows, 1, at));
    const V z = sigmoid<Scalar>(load_sum(rows, 2, at));
    const V n_h = load_sum(rows, 3, at);
    const V n = tanh<Scalar>(load_sum(rows, 0, at) + r * n_h);
    const V h_previous = load_at(rows.previous[0], at);
    store_at(rows.states[0], at, n + z * (h_previous - n));
    if (!rows.kept.data) return;
    keep(rows, 0, at, n);
    keep(rows, 1, at, r);
    keep(rows, 2, at, z);
    keep(rows, 3, at, n_h);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    constexpr Scalar one = Scalar(1);
    const V grad = load_gradient(rows, at);
    const V n = load_kept(rows, 0, at);
    const V r = load_kept(rows, 1, at);
    const V z = load_kept(rows, 2, at);
    const V n_h = load_kept(rows, 3, at);
    const V h_previous = load_at(rows.previous[0], at);
    const V dn = grad * (one - z) * (one - n * n);
    store_dz(rows, 0, at, dn);
    store_dz(rows, 1, at, dn * n_h * (r * (one - r)));
    store_dz(rows, 2, at, grad * (h_previous - n) * (z * (one - z)));
    store_dz(rows, 3, at, dn * r);
    store_at(rows.grad_previous[0], at, grad * z);
  }
};

}  // namespace
}  // namespace namernn_fast
