// The vanilla cell: h_t = act(z_t), with one sum per hidden unit,
// z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.
#pragma once

#include "kernel/cells/cell.h"

namespace namernn_fast {
namespace {

struct Vanilla : CellDefaults {
  static constexpr CellKind kind = CellKind::vanilla;
  static constexpr const char* name = "vanilla";
  static constexpr int64_t weight_blocks = 1;
  static constexpr int64_t sums = 1;
  static constexpr int64_t first_state_sum = 0;
  static constexpr int64_t input_block(int64_t sum) { return sum; }
  static constexpr bool sums_in_output = true;
  static constexpr int64_t kept = 0;  // the derivative of act follows from h = act(z)
  static constexpr int states = 1;
  static constexpr bool only_through_sums = true;
  static constexpr int64_t activations = 2;

  Activation activation;

  template <class Storage>
  explicit Vanilla(const Layer<Storage>& layer) : activation(layer.activation) {}

  template <class Scalar, class Storage>
  void states_of(const StateRow<Scalar, Storage>& row) const {
    const bool is_tanh = activation == Activation::tanh;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      const Vec<Scalar> z = load_upto(row.sums + j, lanes);
      store_upto(row.states[0] + j, is_tanh ? tanh<Scalar>(z) : relu<Scalar>(z), lanes);
    });
  }

  template <class Storage, class Scalar, class Elements>
  void sum_gradients(const GradientRow<Storage, Scalar, Elements>& row) const {
    const bool is_tanh = activation == Activation::tanh;
    for_each_vector<Scalar>(row.width, [=](int64_t j, int64_t lanes) {
      const Vec<Scalar> grad = load_gradient(row, j, lanes);
      const Vec<Scalar> h = load_upto(row.output + j, lanes);
      const Vec<Scalar> dz = is_tanh ? grad * (Scalar(1) - h * h) : relu_gradient<Scalar>(grad, h);
      store_upto(row.dz + j, dz, lanes);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
