// The vanilla cell: what is done with the sums of a block of units, what the backward recurrence
// does with their gradient, how many column blocks the weights have. docs/architecture.md says what
// else another cell would change.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

// Column blocks of the weights, H columns each: one for every gate of a cell. The panel formats in
// weights.h and bfloat16_*.h follow from it.
constexpr int64_t kGates = 1;

// h = act(z), with z the sums of a block of units.
template <class Scalar>
inline Vec<Scalar> activate(Activation activation, Vec<Scalar> z) {
  const Vec<Scalar> zero = {};
  return activation == Activation::tanh ? tanh<Scalar>(z) : z < zero ? zero : z;
}

// h = act(z) in place, for `width` units.
template <class Scalar>
inline void activate(Activation activation, Scalar* z, int64_t width) {
  for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
    store_upto(z + j, activate<Scalar>(activation, load_upto(z + j, n)), n);
  });
}

// One step of the backward recurrence for `width` units: dz = (grad_h + grad_output) act'(z), with
// act' from h = act(z). `grad_output` may be null, for zeros.
template <class Storage, class Scalar, class Element>
inline void activate_backward(Activation activation, const Storage* h, const Scalar* grad_h,
                              const Storage* grad_output, Element* dz, int64_t width) {
  for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
    Vec<Scalar> g = load_upto(grad_h + j, n);
    if (grad_output) g += load_upto(grad_output + j, n);
    const Vec<Scalar> v = load_upto(h + j, n);
    const Vec<Scalar> zero = {};
    // Compares bits: under FlushSubnormals, v == 0 would hold for a subnormal v, too.
    const auto is_zero = ((typename Simd<Scalar>::I)v << 1) == 0;
    store_upto(dz + j,
               activation == Activation::tanh ? g * (Scalar(1) - v * v)
               : is_zero                      ? zero
                                              : g,
               n);
  });
}

}  // namespace
}  // namespace namernn_fast
