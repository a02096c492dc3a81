// A cell for tests, which has what no other cell has: four states, and an output that depends on
// the previous h besides the sums.
//   i = sigmoid(W_ii x_t + b_ii + W_hi h_{t-1} + b_hi)
//   g = tanh(W_ig x_t + b_ig + W_hg h_{t-1} + b_hg)
//   c_t = i c_{t-1} + (1 - i) g / 2
//   n_t = (n_{t-1} + i) / 2
//   m_t = g m_{t-1} + h_{t-1} / 2 + noise_t
//   h_t = tanh(c_t + a n_t m_t),  a = sigmoid(rate)
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

struct Tested {
  static constexpr CellKind kind = CellKind::tested;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "tested";
    cell.gates = 2;
    cell.sums = 2;
    cell.states = 4;
    cell.kept = 5;  // i, g, c, n and m
    cell.inputs = 1;
    cell.input_names[0] = "noise";
    cell.own = 1;
    cell.own_names[0] = "rate";
    cell.only_through_sums = false;
    return cell;
  }

  template <class Scalar>
  static Vec<Scalar> prepare_own(int64_t, Vec<Scalar> rate) {
    return sigmoid<Scalar>(rate);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    constexpr Scalar half = Scalar(0.5);
    const V a = load_upto(rows.own[0] + at.unit, at.lanes);
    const V i = sigmoid<Scalar>(load_sum(rows, 0, at));
    const V g = tanh<Scalar>(load_sum(rows, 1, at));
    const V c_previous = load_at(rows.previous[1], at);
    const V c = i * c_previous + half * (Scalar(1) - i) * g;
    const V n = half * (load_at(rows.previous[2], at) + i);
    V m = g * load_at(rows.previous[3], at) + half * load_at(rows.previous[0], at);
    if (rows.inputs[0].data) m += load_at(rows.inputs[0], at);
    store_at(rows.states[1], at, c);
    store_at(rows.states[2], at, n);
    store_at(rows.states[3], at, m);
    store_at(rows.states[0], at, tanh<Scalar>(c + a * n * m));
    if (!rows.kept.data) return;
    keep(rows, 0, at, i);
    keep(rows, 1, at, g);
    keep(rows, 2, at, c);
    keep(rows, 3, at, n);
    keep(rows, 4, at, m);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    using V = Vec<Scalar>;
    constexpr Scalar one = Scalar(1), half = Scalar(0.5);
    const V a = load_upto(rows.own[0] + at.unit, at.lanes);
    const V i = load_kept(rows, 0, at);
    const V g = load_kept(rows, 1, at);
    const V n = load_kept(rows, 3, at);
    const V m = load_kept(rows, 4, at);
    const V h = tanh<Scalar>(load_kept(rows, 2, at) + a * n * m);
    const V dy = load_gradient(rows, at) * (one - h * h);
    const V dc = load_at(rows.grad[1], at) + dy;
    const V dn = load_at(rows.grad[2], at) + dy * a * m;
    const V dm = load_at(rows.grad[3], at) + dy * a * n;
    const V di = dc * (load_at(rows.previous[1], at) - half * g) + half * dn;
    const V dg = half * dc * (one - i) + dm * load_at(rows.previous[3], at);
    store_dz(rows, 0, at, di * (i * (one - i)));
    store_dz(rows, 1, at, dg * (one - g * g));
    Scalar* total = rows.grad_own[0] + at.unit;
    store_upto(total, load_upto(total, at.lanes) + dy * n * m * (a * (one - a)), at.lanes);
    store_at(rows.grad_previous[0], at, half * dm);
    store_at(rows.grad_previous[1], at, dc * i);
    store_at(rows.grad_previous[2], at, half * dn);
    store_at(rows.grad_previous[3], at, dm * g);
    if (rows.grad_inputs[0].data) store_at(rows.grad_inputs[0], at, dm);
  }
};

// `Independent` has no weight_hh, and nothing reads its previous h.
//   f = sigmoid(W_if x_t + b_if)
//   c_t = f c_{t-1} + W_iz x_t + b_iz
//   h_t = act(c_t)
struct Independent : NothingOwned {
  static constexpr CellKind kind = CellKind::independent;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "independent";
    cell.gates = 2;
    cell.sums = 2;
    cell.states = 2;
    cell.kept = 2;  // f and c
    cell.activations = 2;
    cell.has_weight_hh = false;
    return cell;
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    const Vec<Scalar> f = sigmoid<Scalar>(load_sum(rows, 0, at));
    const Vec<Scalar> c = f * load_at(rows.previous[1], at) + load_sum(rows, 1, at);
    const bool is_tanh = rows.activation == Activation::tanh;
    store_at(rows.states[1], at, c);
    store_at(rows.states[0], at, is_tanh ? tanh<Scalar>(c) : relu<Scalar>(c));
    if (!rows.kept.data) return;
    keep(rows, 0, at, f);
    keep(rows, 1, at, c);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    constexpr Scalar one = Scalar(1);
    const Vec<Scalar> f = load_kept(rows, 0, at);
    const Vec<Scalar> h = load_at(rows.output, at);
    const Vec<Scalar> grad = load_gradient(rows, at);
    const bool is_tanh = rows.activation == Activation::tanh;
    const Vec<Scalar> dc = load_at(rows.grad[1], at) +
                           (is_tanh ? grad * (one - h * h) : relu_gradient<Scalar>(grad, h));
    store_dz(rows, 0, at, dc * load_at(rows.previous[1], at) * (f * (one - f)));
    store_dz(rows, 1, at, dc);
    store_at(rows.grad_previous[1], at, dc * f);
  }
};

}  // namespace
}  // namespace namernn_fast
