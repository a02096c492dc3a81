// The vanilla cell: h_t = act(z_t), with one sum per hidden unit,
// z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.
//
// A cell is a type. The passes are templates over it and use nothing but
// its members; register tiles and products do not depend on the cell. Each pass asserts what it
// assumes about the constants below, so a cell with other values does not compile until that pass
// supports it.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

struct Elman {
  // Number of blocks of H rows in weight_ih and in weight_hh, one per gate.
  static constexpr int64_t weight_blocks = 1;
  // Number of blocks of H sums (values before the activation) in each row. The input contributes to
  // the first weight_blocks of them, the state before to weight_blocks of them from
  // first_state_sum on.
  static constexpr int64_t sums = 1;
  static constexpr int64_t first_state_sum = 0;
  // Returns the block of weight_ih that contributes to a sum. Blocks of weight_hh contribute to the
  // state's sums in order.
  static constexpr int64_t input_block(int64_t sum) { return sum; }
  // Whether a row's sums are stored in its row of the output until its states replace them.
  static constexpr bool sums_in_output = true;
  // Number of blocks of H values that each row keeps for the backward pass besides its states,
  // which are in the output. None here, because the derivative of act follows from h = act(z).
  static constexpr int64_t kept = 0;
  // Whether the state depends on the state before through sums alone. If not, sum_gradients() also
  // writes the rest of the gradient of the state before.
  static constexpr bool only_through_sums = true;
  // Whether a row has a cell state besides its state, which the next step reads without a product.
  // If so, it is the last block of the kept values.
  static constexpr bool has_cell_state = false;
  // Whether bias_ih and bias_hh have the same gradient: the sum of dz over all rows.
  static constexpr bool one_bias_gradient = true;

  Activation activation;

  template <class Storage>
  explicit Elman(const Layer<Storage>& layer) : activation(layer.activation) {}

  // Returns the states of a vector of sums.
  template <class Scalar>
  Vec<Scalar> state(Vec<Scalar> z) const {
    const Vec<Scalar> zero = {};
    return activation == Activation::tanh ? tanh<Scalar>(z) : z < zero ? zero : z;
  }

  // Replaces sums by states, for `width` units of a row.
  template <class Scalar>
  void states(Scalar* z, int64_t width) const {
    for_each_vector<Scalar>(width, [cell = *this, z](int64_t j, int64_t n) {
      store_upto(z + j, cell.state<Scalar>(load_upto(z + j, n)), n);
    });
  }

  // Computes gradients of sums from gradients of states, for `width` units of a row:
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
      // Compares bits, because under FlushSubnormals v == 0 is true for a subnormal v, too.
      const auto is_zero = ((typename Simd<Scalar>::I)v << 1) == 0;
      store_upto(dz + j, is_tanh ? g * (Scalar(1) - v * v) : is_zero ? zero : g, n);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
