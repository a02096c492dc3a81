// Cells for tests, which have what no other cell has.
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

// `FourStates` has four states, inputs of both sizes, a parameter with one block per gate, and an
// output that depends on the previous h besides the sums. With kMeans, it also subtracts the mean
// over all sums of a row, and adds a mean over c_t; without, the means are zeros.
//   i = sigmoid(z_i - mean(z) + shift_i),  z_i = W_ii x_t + b_ii + W_hi h_{t-1} + b_hi
//   g = tanh(z_g - mean(z) + shift_g),     z_g = W_ig x_t + b_ig + W_hg h_{t-1} + b_hg
//   c_t = i c_{t-1} + (1 - i) g / 2
//   n_t = (n_{t-1} + i) / 2
//   m_t = g m_{t-1} + h_{t-1} / 2 + drive_t
//   h_t = act(c_t + mean(1/16 - c_t) + (a m_t + attention_t) n_t),  a = sigmoid(rate)
template <bool kMeans>
struct FourStates {
  static constexpr CellKind kind = kMeans ? CellKind::with_means : CellKind::four_states;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = kMeans ? "means" : "four states";
    cell.gates = 2;
    cell.sums = 2;
    cell.states = 4;
    cell.kept = 5;  // i, g, c, n and m
    cell.inputs = 2;
    cell.input_names[0] = "drive";
    cell.input_names[1] = "attention";
    cell.input_is_number[1] = true;
    cell.own = 2;
    cell.own_names[0] = "rate";
    cell.own_names[1] = "shift";
    cell.own_blocks[1] = 2;
    cell.activations = 2;
    cell.only_through_sums = false;
    cell.can_have_heads = true;
    cell.states_need_rows = kMeans;
    cell.gradients_need_rows = true;
    return cell;
  }

  template <class Scalar>
  static Vec<Scalar> prepare_own(int64_t i, Vec<Scalar> values) {
    return i == 0 ? sigmoid<Scalar>(values) : values;
  }

  template <class Storage>
  static void states_of(const StateRows<Storage>& rows, At at) {
    update(rows, at, 0);
    finish(rows, at, 0);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of_row(const StateRows<Storage>& rows, int64_t r) {
    const Scalar mean =
        mean_of_row(rows, r, [&](At at) { return load_sum(rows, 0, at) + load_sum(rows, 1, at); });
    for_each_place_in_row(rows, r, [&](At at) { update(rows, at, mean / 2); });
    const Scalar mean_c =
        mean_of_row(rows, r, [&](At at) { return Scalar(0.0625) - load_at(rows.states[1], at); });
    for_each_place_in_row(rows, r, [&](At at) { finish(rows, at, mean_c); });
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients_of_row(const GradientRows<Storage>& rows, int64_t r) {
    using V = Vec<Scalar>;
    constexpr Scalar one = Scalar(1), half = Scalar(0.5);
    // Returns the gradient of the argument of act.
    const auto dy_at = [&](At at) {
      const V grad = load_gradient(rows, at), h = load_at(rows.output, at);
      return rows.activation == Activation::tanh ? grad * (one - h * h)
                                                 : relu_gradient<Scalar>(grad, h);
    };
    if (rows.grad_inputs[1].data) {
      const Scalar mean =
          mean_of_row(rows, r, [&](At at) { return dy_at(at) * load_kept(rows, 3, at); });
      store_number(rows.grad_inputs[1], rows.range.row + r, mean * Scalar(rows.range.units));
    }
    const Scalar mean_dy = kMeans ? mean_of_row(rows, r, dy_at) : 0;
    for_each_place_in_row(rows, r, [&](At at) {
      const V a = load_own(rows, 0, 0, at);
      const V i = load_kept(rows, 0, at);
      const V g = load_kept(rows, 1, at);
      const V n = load_kept(rows, 3, at);
      const V m = load_kept(rows, 4, at);
      const V dy = dy_at(at);
      const V dc = load_at(rows.grad[1], at) + (dy - mean_dy);
      const V dn = load_at(rows.grad[2], at) + dy * (a * m + load_number(rows.inputs[1], at));
      const V dm = load_at(rows.grad[3], at) + dy * a * n;
      const V di = dc * (load_at(rows.previous[1], at) - half * g) + half * dn;
      const V dg = half * dc * (one - i) + dm * load_at(rows.previous[3], at);
      const V dz_i = di * (i * (one - i)), dz_g = dg * (one - g * g);
      store_dz(rows, 0, at, dz_i);
      store_dz(rows, 1, at, dz_g);
      add_own(rows, 0, 0, at, dy * n * m * (a * (one - a)));
      add_own(rows, 1, 0, at, dz_i);
      add_own(rows, 1, 1, at, dz_g);
      store_at(rows.grad_previous[0], at, half * dm);
      store_at(rows.grad_previous[1], at, dc * i);
      store_at(rows.grad_previous[2], at, half * dn);
      store_at(rows.grad_previous[3], at, dm * g);
      if (rows.grad_inputs[0].data) store_at(rows.grad_inputs[0], at, dm);
    });
    if (!kMeans) return;
    const auto dz = [&](int64_t sum, At at) {
      return load_upto(rows.dz.data + at.sum + sum * rows.sum_stride, at.lanes);
    };
    const Scalar mean_dz = mean_of_row(rows, r, [&](At at) { return dz(0, at) + dz(1, at); }) / 2;
    for_each_place_in_row(rows, r, [&](At at) {
      for (int64_t sum = 0; sum < 2; ++sum) store_dz(rows, sum, at, dz(sum, at) - mean_dz);
    });
  }

 private:
  // Computes c, n and m, given the mean over the sums.
  template <class Storage, class Scalar = Compute<Storage>>
  static void update(const StateRows<Storage>& rows, At at, Compute<Storage> mean) {
    using V = Vec<Scalar>;
    constexpr Scalar half = Scalar(0.5);
    const V i = sigmoid<Scalar>(load_sum(rows, 0, at) - mean + load_own(rows, 1, 0, at));
    const V g = tanh<Scalar>(load_sum(rows, 1, at) - mean + load_own(rows, 1, 1, at));
    const V c_previous = load_at(rows.previous[1], at);
    const V c = i * c_previous + half * (Scalar(1) - i) * g;
    const V n = half * (load_at(rows.previous[2], at) + i);
    V m = g * load_at(rows.previous[3], at) + half * load_at(rows.previous[0], at);
    if (rows.inputs[0].data) m += load_at(rows.inputs[0], at);
    store_at(rows.states[1], at, c);
    store_at(rows.states[2], at, n);
    store_at(rows.states[3], at, m);
    if (!rows.kept.data) return;
    keep(rows, 0, at, i);
    keep(rows, 1, at, g);
    keep(rows, 2, at, c);
    keep(rows, 3, at, n);
    keep(rows, 4, at, m);
  }

  // Computes h, given the mean of 1/16 - c.
  template <class Storage, class Scalar = Compute<Storage>>
  static void finish(const StateRows<Storage>& rows, At at, Compute<Storage> mean_c) {
    using V = Vec<Scalar>;
    const V c = load_at(rows.states[1], at), m = load_at(rows.states[3], at);
    const V weight = load_own(rows, 0, 0, at) * m + load_number(rows.inputs[1], at);
    const V y = c + mean_c + weight * load_at(rows.states[2], at);
    const bool is_tanh = rows.activation == Activation::tanh;
    store_at(rows.states[0], at, is_tanh ? tanh<Scalar>(y) : relu<Scalar>(y));
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
