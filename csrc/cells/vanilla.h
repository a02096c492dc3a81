// The vanilla cell: h_t = act(z_t), with one sum per hidden unit,
// z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

struct Vanilla : NothingOwned {
  static constexpr CellKind kind = CellKind::vanilla;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "vanilla";
    cell.gates = 1;
    cell.sums = 1;
    cell.kept = 0;  // the derivative of act is computed from h = act(z)
    cell.activations = 2;
    return cell;
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    const bool is_tanh = rows.activation == Activation::tanh;
    const Vec<Scalar> z = load_sum(rows, 0, at);
    store_at(rows.states[0], at, is_tanh ? tanh<Scalar>(z) : relu<Scalar>(z));
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    const bool is_tanh = rows.activation == Activation::tanh;
    const Vec<Scalar> grad = load_gradient(rows, at);
    const Vec<Scalar> h = load_at(rows.output, at);
    const Vec<Scalar> dz = is_tanh ? grad * (Scalar(1) - h * h) : relu_gradient<Scalar>(grad, h);
    store_dz(rows, 0, at, dz);
  }
};

}  // namespace
}  // namespace namernn_fast
