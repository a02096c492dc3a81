// The leaky integrator. Besides its output r = h, a row has a state v, which moves towards z at the
// rate a of each hidden unit.
//   z = W_ih x_t + b_ih + W_hh r_{t-1} + b_hh
//   v_t = (1 - a) v_{t-1} + a z + noise_t,  a = sigmoid(rate)
//   r_t = act(v_t)
#pragma once

#include "kernel/cells/cell.h"

namespace namernn_fast {
namespace {

struct Leaky : CellDefaults {
  static constexpr CellKind kind = CellKind::leaky;
  static constexpr const char* name = "leaky";
  static constexpr int64_t weight_blocks = 1;
  static constexpr int64_t sums = 1;
  static constexpr int64_t first_state_sum = 0;
  static constexpr int64_t input_block(int64_t sum) { return sum; }
  static constexpr bool sums_in_output = true;
  static constexpr int64_t kept = 2;  // z - v_{t-1} and v_t
  static constexpr int states = 2;
  static constexpr bool only_through_sums = true;
  static constexpr int64_t activations = 4;
  static constexpr bool has_rate = true;

  Activation activation;

  template <class Storage>
  explicit Leaky(const Layer<Storage>& layer) : activation(layer.activation) {}

  template <class Scalar, class Storage>
  void states_of(const StateRow<Scalar, Storage>& row) const {
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      const Vec<Scalar> z = load_upto(row.sums + j, lanes);
      const Vec<Scalar> a = load_upto(row.rate + j, lanes);
      const Vec<Scalar> v_previous = load_state<Scalar>(row.previous[1], j, lanes);
      Vec<Scalar> v = (Scalar(1) - a) * v_previous + a * z;
      if (row.noise) v += load_upto(row.noise + j, lanes);
      store_upto(row.states[1] + j, v, lanes);
      store_upto(row.states[0] + j, act<Scalar>(v), lanes);
      if (!row.kept) return;
      store_upto(row.kept + j, z - v_previous, lanes);
      store_upto(row.kept + row.H + j, v, lanes);
    });
  }

  template <class Storage, class Scalar, class Elements>
  void sum_gradients(const GradientRow<Storage, Scalar, Elements>& row) const {
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      constexpr Scalar one = Scalar(1);
      const Vec<Scalar> difference = load_upto(row.kept + j, lanes);
      const Vec<Scalar> v = load_upto(row.kept + row.H + j, lanes);
      const Vec<Scalar> r = load_upto(row.output + j, lanes);
      const Vec<Scalar> a = load_upto(row.rate + j, lanes);
      const Vec<Scalar> dv = load_upto(row.grad[1] + j, lanes) +
                             act_gradient<Scalar>(load_gradient(row, j, lanes), r, v);
      store_upto(row.dz + j, dv * a, lanes);
      const Vec<Scalar> grad_rate = dv * difference * (a * (one - a));
      store_upto(row.grad_rate + j, load_upto(row.grad_rate + j, lanes) + grad_rate, lanes);
      store_upto(row.grad_previous[1] + j, dv * (one - a), lanes);
      if (row.grad_noise) store_upto(row.grad_noise + j, dv, lanes);
    });
  }

 private:
  template <class Scalar>
  Vec<Scalar> act(Vec<Scalar> v) const {
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
  Vec<Scalar> act_gradient(Vec<Scalar> grad, Vec<Scalar> r, Vec<Scalar> v) const {
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
