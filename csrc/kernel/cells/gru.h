// The gated recurrent unit, as torch defines it: the reset gate r scales the product with the state
// before, and b_hn with it.
//   r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)
//   z = sigmoid(W_iz x_t + b_iz + W_hz h_{t-1} + b_hz)
//   n = tanh(n_x + r n_h),  n_x = W_in x_t + b_in,  n_h = W_hn h_{t-1} + b_hn
//   h_t = n + z (h_{t-1} - n)
// torch stores the weight blocks in the order r, z, n. See elman.h for what a cell provides.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

struct Gru {
  static constexpr int64_t weight_blocks = 3;
  // In the order n_x, r, z, n_h: the sums of the input are adjacent, and so are those of the state,
  // in the order of weight_hh.
  static constexpr int64_t sums = 4;
  static constexpr int64_t first_state_sum = 1;
  static constexpr int64_t input_block(int64_t sum) { return sum == 0 ? 2 : sum - 1; }
  static constexpr bool sums_in_output = false;
  // n, r, z and n_h: the order of the sums, with n instead of n_x.
  static constexpr int64_t kept = 4;
  static constexpr bool only_through_sums = false;  // h_t also has z h_{t-1}
  static constexpr bool has_cell_state = false;
  // The gradient of b_hn sums those of n_h, the gradient of b_in sums those of n_x.
  static constexpr bool one_bias_gradient = false;

  template <class Storage>
  explicit Gru(const Layer<Storage>&) {}

  // Computes states `h` from sums, for `width` units of a row. Blocks of `sums` are `stride` apart,
  // those of `kept` H. A null `before` stands for zeros, and `h` may be `before`. A null `kept`:
  // nothing is kept.
  template <class Scalar, class Storage>
  void states(const Scalar* sums, int64_t stride, const Scalar* before, Scalar* h, Storage* kept,
              int64_t H, int64_t width) const {
    for_each_vector<Scalar>(width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      const V r = sigmoid<Scalar>(load_upto(sums + stride + j, lanes));
      const V z = sigmoid<Scalar>(load_upto(sums + 2 * stride + j, lanes));
      const V n_h = load_upto(sums + 3 * stride + j, lanes);
      const V n = tanh<Scalar>(load_upto(sums + j, lanes) + r * n_h);
      const V was = before ? load_upto(before + j, lanes) : V{};
      store_upto(h + j, n + z * (was - n), lanes);
      if (!kept) return;
      store_upto(kept + j, n, lanes);
      store_upto(kept + H + j, r, lanes);
      store_upto(kept + 2 * H + j, z, lanes);
      store_upto(kept + 3 * H + j, n_h, lanes);
    });
  }

  // Computes gradients of sums `dz` from the gradient of the state, grad_h + grad_output, for
  // `width` units of a row, and writes to `grad_before` the part of the gradient of the state
  // before that does not go through a sum. Blocks of `dz` are `stride` apart, those of `kept` H.
  // Null pointers stand for zeros.
  template <class Storage, class Scalar, class Element>
  void sum_gradients(const Storage* kept, const Storage* before, const Scalar* grad_h,
                     const Storage* grad_output, Element* dz, int64_t stride, Scalar* grad_before,
                     int64_t H, int64_t width) const {
    for_each_vector<Scalar>(width, [=](int64_t j, int64_t lanes) {
      using V = Vec<Scalar>;
      constexpr Scalar one = Scalar(1);
      V g = load_upto(grad_h + j, lanes);
      if (grad_output) g += load_upto(grad_output + j, lanes);
      const V n = load_upto(kept + j, lanes);
      const V r = load_upto(kept + H + j, lanes);
      const V z = load_upto(kept + 2 * H + j, lanes);
      const V n_h = load_upto(kept + 3 * H + j, lanes);
      const V was = before ? load_upto(before + j, lanes) : V{};
      const V dn = g * (one - z) * (one - n * n);
      store_upto(dz + j, dn, lanes);
      store_upto(dz + stride + j, dn * n_h * (r * (one - r)), lanes);
      store_upto(dz + 2 * stride + j, g * (was - n) * (z * (one - z)), lanes);
      store_upto(dz + 3 * stride + j, dn * r, lanes);
      store_upto(grad_before + j, g * z, lanes);
    });
  }
};

}  // namespace
}  // namespace namernn_fast
