// A leaky integrator. Besides the output r (h in other cells), each row has a state v. At each
// step, v moves towards z by a fraction a, which is a parameter of each hidden unit.
//   z = W_ih x_t + b_ih + W_hh r_{t-1} + b_hh
//   v_t = (1 - a) v_{t-1} + a z + noise_t,  a = sigmoid(rate)
//   r_t = act(v_t)
#pragma once

#include "cells/common.h"

namespace namernn_fast {
namespace {

struct Leaky {
  static constexpr CellKind kind = CellKind::leaky;

  static constexpr Cell lists() {
    Cell cell = usual_cell();
    cell.name = "leaky";
    cell.gates = 1;
    cell.sums = 1;
    cell.states = 2;
    cell.kept = 2;  // z - v_{t-1} and v_t
    cell.inputs = 1;
    cell.input_names[0] = "noise";
    cell.own = 1;  // the logit of a for each hidden unit
    cell.own_names[0] = "rate";
    cell.activations = 4;
    return cell;
  }

  template <class Scalar>
  static Vec<Scalar> prepare_own(int64_t, Vec<Scalar> rate) {
    return sigmoid<Scalar>(rate);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void states_of(const StateRows<Storage>& rows, At at) {
    const Vec<Scalar> z = load_sum(rows, 0, at);
    const Vec<Scalar> a = load_own(rows, 0, 0, at);
    const Vec<Scalar> v_previous = load_at(rows.previous[1], at);
    Vec<Scalar> v = (Scalar(1) - a) * v_previous + a * z;
    if (rows.inputs[0].data) v += load_at(rows.inputs[0], at);
    store_at(rows.states[1], at, v);
    store_at(rows.states[0], at, act<Scalar>(rows.activation, v));
    if (!rows.kept.data) return;
    keep(rows, 0, at, z - v_previous);
    keep(rows, 1, at, v);
  }

  template <class Storage, class Scalar = Compute<Storage>>
  static void sum_gradients(const GradientRows<Storage>& rows, At at) {
    constexpr Scalar one = Scalar(1);
    const Vec<Scalar> difference = load_kept(rows, 0, at);
    const Vec<Scalar> v = load_kept(rows, 1, at);
    const Vec<Scalar> r = load_at(rows.output, at);
    const Vec<Scalar> a = load_own(rows, 0, 0, at);
    const Vec<Scalar> grad = load_gradient(rows, at);
    const Vec<Scalar> dv =
        load_at(rows.grad[1], at) + act_gradient<Scalar>(rows.activation, grad, r, v);
    store_dz(rows, 0, at, dv * a);
    add_own(rows, 0, 0, at, dv * difference * (a * (one - a)));
    store_at(rows.grad_previous[1], at, dv * (one - a));
    if (rows.grad_inputs[0].data) store_at(rows.grad_inputs[0], at, dv);
  }

 private:
  template <class Scalar>
  static Vec<Scalar> act(Activation activation, Vec<Scalar> v) {
    switch (activation) {
      case Activation::tanh:
        return tanh<Scalar>(v);
      case Activation::relu:
        return relu<Scalar>(v);
      case Activation::sigmoid:
        return sigmoid<Scalar>(v);
      case Activation::softplus:
        break;
    }
    return softplus<Scalar>(v);
  }

  // Returns the gradient of v, given the gradient of r = act(v).
  template <class Scalar>
  static Vec<Scalar> act_gradient(Activation activation, Vec<Scalar> grad, Vec<Scalar> r,
                                  Vec<Scalar> v) {
    switch (activation) {
      case Activation::tanh:
        return grad * (Scalar(1) - r * r);
      case Activation::relu:
        return relu_gradient<Scalar>(grad, r);
      case Activation::sigmoid:
        return grad * (r * (Scalar(1) - r));
      case Activation::softplus:
        break;
    }
    return grad * sigmoid<Scalar>(v);
  }
};

}  // namespace
}  // namespace namernn_fast
