// The vanilla cell: h_t = act(z_t), with one sum for each hidden unit,
// z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.
//
// A cell is a type, and this is the only one. The passes know a cell through its members alone;
// register tiles and the products around them do not know it at all. A pass asserts what it takes
// for granted about the constants below, so a cell with other values does not compile until that
// pass can compute it.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

struct Elman {
  // Blocks of H rows in weight_ih and weight_hh.
  static constexpr int64_t weight_blocks = 1;
  // Blocks of H sums in each row.
  static constexpr int64_t sums = 1;
  // Whether the sums of a row lie in its row of the output until its states replace them.
  static constexpr bool sums_in_output = true;
  // Blocks of H numbers that each row keeps for the backward pass in addition to its states, which
  // the output holds. The derivative of act follows from h = act(z).
  static constexpr int64_t kept = 0;
  // Whether bias_ih and bias_hh have the same gradient: the sum of dz over all rows.
  static constexpr bool one_bias_gradient = true;

  Activation activation;

  template <class Storage>
  explicit Elman(const Layer<Storage>& layer) : activation(layer.activation) {}

  // From a vector of sums to states.
  template <class Scalar>
  Vec<Scalar> state(Vec<Scalar> z) const {
    const Vec<Scalar> zero = {};
    return activation == Activation::tanh ? tanh<Scalar>(z) : z < zero ? zero : z;
  }

  // From sums to states, in place, for `width` units of a row.
  template <class Scalar>
  void states(Scalar* z, int64_t width) const {
    for_each_vector<Scalar>(width, [cell = *this, z](int64_t j, int64_t n) {
      store_upto(z + j, cell.state<Scalar>(load_upto(z + j, n)), n);
    });
  }

  // From gradients of states to gradients of sums, for `width` units of a row:
  // dz = (grad_h + grad_output) act'(z). A null `grad_output` stands for zeros.
  template <class Storage, class Scalar, class Element>
  void sum_gradients(const Storage* h, const Scalar* grad_h, const Storage* grad_output,
                     Element* dz, int64_t width) const {
    const bool is_tanh = activation == Activation::tanh;
    for_each_vector<Scalar>(width, [=](int64_t j, int64_t n) {
      Vec<Scalar> g = load_upto(grad_h + j, n);
      if (grad_output) g += load_upto(grad_output + j, n);
      const Vec<Scalar> v = load_upto(h + j, n);
      const Vec<Scalar> zero = {};
      // Compares bits: under FlushSubnormals, v == 0 would hold for a subnormal v, too.
      const auto is_zero = ((typename Simd<Scalar>::I)v << 1) == 0;
      store_upto(dz + j, is_tanh ? g * (Scalar(1) - v * v) : is_zero ? zero : g, n);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
