// Gradients that are sums of rows of dz: those of the biases, and that of a table by token.
#pragma once

#include "kernel/sharing.h"

namespace namernn_fast {
namespace {

// The sum of n adjacent columns over rows, by halves: its error grows with the logarithm of rows.
template <class Element>
inline Vec<Compute<Element>> sum_rows(const Element* first, int64_t stride, int64_t rows,
                                      int64_t n) {
  if (rows > 16) {
    const int64_t half = rows / 2;
    return sum_rows(first, stride, half, n) +
           sum_rows(first + half * stride, stride, rows - half, n);
  }
  Vec<Compute<Element>> sum = {};
  for (int64_t r = 0; r < rows; ++r) sum += load_upto(first + r * stride, n);
  return sum;
}

// grad [H] (+)= the sum of dz over the block's rows.
template <class Products, class Scalar>
inline void add_bias_gradient(const Products& products, bool initial, Share& share, int64_t H,
                              int64_t rows, Scalar* grad) {
  if (!take(share)) return;
  for_each_vector<Scalar>(H, [&](int64_t j, int64_t n) {
    const Vec<Scalar> sum = sum_rows(products.dz + j, products.dz_stride, rows, n);
    store_upto(grad + j, initial ? sum : load_upto(grad + j, n) + sum, n);
  });
}

// grad [V, H] (+)= the rows of dz, each added to the row of its token, in the order of the rows.
template <class Products, class Scalar>
inline void add_table_gradient(const Products& products, const int64_t* tokens, bool initial,
                               Share& share, int64_t V, int64_t H, int64_t rows, Scalar* grad) {
  for (int64_t first = 0; first < H; first += Products::w) {
    if (!take(share)) continue;
    const int64_t width = min64(Products::w, H - first);
    for (int64_t v = 0; initial && v < V; ++v) {
      std::memset(grad + v * H + first, 0, width * sizeof(Scalar));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const auto* dz = products.dz + r * products.dz_stride + first;
      Scalar* sum = grad + tokens[r] * H + first;
      for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
        store_upto(sum + j, load_upto(sum + j, n) + load_upto(dz + j, n), n);
      });
    }
  }
}

}  // namespace
}  // namespace namernn_fast
