// The long short-term memory, as torch defines it. Besides the output h, each row has a cell state
// c, which the next step reads elementwise, without a matrix product.
//   i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
//   f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf)
//   g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
//   o = sigmoid(W_io x_t + b_io + W_ho h_{t-1} + b_ho)
//   c_t = f c_{t-1} + i g
//   h_t = o tanh(c_t), or W_hr (o tanh(c_t)) in a layer that projects h
// torch stores the weight blocks in the order i, f, g, o.
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

struct Lstm : NothingOwned {
  static constexpr CellKind kind = CellKind::lstm;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "LSTM";
    cell.gates = 4;
    cell.sums = 4;  // i, f, g and o; both input and state contribute to each
    cell.states = 2;
    cell.kept = 5;  // i, f, g, o and c
    cell.can_project = true;
    return cell;
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    const V i = sigmoid<Scalar>(load_sum(rows, 0, at));
    const V f = sigmoid<Scalar>(load_sum(rows, 1, at));
    const V g = tanh<Scalar>(load_sum(rows, 2, at));
    const V o = sigmoid<Scalar>(load_sum(rows, 3, at));
    const V c_previous = load_at(rows.previous[1], at);
    const V c = f * c_previous + i * g;
    store_at(rows.states[1], at, c);
    store_at(rows.states[0], at, o * tanh<Scalar>(c));
    if (!rows.kept.data) return;
    keep(rows, 0, at, i);
    keep(rows, 1, at, f);
    keep(rows, 2, at, g);
    keep(rows, 3, at, o);
    keep(rows, 4, at, c);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    constexpr Scalar one = Scalar(1);
    const V grad = load_gradient(rows, at);
    const V i = load_kept(rows, 0, at);
    const V f = load_kept(rows, 1, at);
    const V g = load_kept(rows, 2, at);
    const V o = load_kept(rows, 3, at);
    const V t = tanh<Scalar>(load_kept(rows, 4, at));
    const V c_previous = load_at(rows.previous[1], at);
    const V dc = load_at(rows.grad[1], at) + grad * o * (one - t * t);
    store_dz(rows, 0, at, dc * g * (i * (one - i)));
    store_dz(rows, 1, at, dc * c_previous * (f * (one - f)));
    store_dz(rows, 2, at, dc * i * (one - g * g));
    store_dz(rows, 3, at, grad * t * (o * (one - o)));
    store_at(rows.grad_previous[1], at, dc * f);
    if (rows.unprojected.data) store_at(rows.unprojected, at, o * t);
  }
};

}  // namespace
}  // namespace namernn_fast
