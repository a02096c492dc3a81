// Computes gradients by summing rows of dz. A bias gradient is the sum of all rows; a table
// gradient has one sum per token.
#pragma once

#include "kernel/backward/time_blocks.h"
#include "kernel/threads/sharing.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

// Returns the sums of n adjacent columns over all rows. Uses pairwise summation, so that the error
// grows only with the logarithm of the number of rows.
template <class Scalar, class Elements>
inline Vec<Scalar> sum_rows(const Elements& first, int64_t stride, int64_t rows, int64_t n) {
  if (rows > 16) {
    const int64_t half = rows / 2;
    return sum_rows<Scalar>(first, stride, half, n) +
           sum_rows<Scalar>(first + half * stride, stride, rows - half, n);
  }
  Vec<Scalar> sum = {};
  for (int64_t r = 0; r < rows; ++r) sum += load_upto(first + r * stride, n);
  return sum;
}

// Adds the sum of dz over the time block's rows to `blocks` of a bias gradient, or overwrites the
// blocks with this sum if `initial`.
template <class Products, class Scalar>
inline void add_bias_gradient(const Products& products, const Blocks& blocks, bool initial,
                              Share& share, int64_t rows, Scalar* grad) {
  if (!take(share)) return;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const auto dz = products.dz + (blocks.sum + i) * products.dz_block;
    Scalar* sums = grad + (blocks.block + i) * products.H;
    for_each_vector<Scalar>(products.H, [&](int64_t j, int64_t n) {
      const Vec<Scalar> sum = sum_rows<Scalar>(dz + j, products.dz_stride, rows, n);
      store_upto(sums + j, initial ? sum : load_upto(sums + j, n) + sum, n);
    });
  }
}

// Links between the rows of a time block that have the same token.
struct TokenRows {
  int64_t* token;   // [rows of a time block], each row's token; null if no table gradient is wanted
  int64_t* before;  // [rows of a time block], the previous row with the same token, or -1
  int64_t* last;    // [V], the last row with each token; stale if the time block lacks the token
};

inline TokenRows token_rows(int64_t V, int64_t rows, const Runtime& runtime) {
  return {scratch<int64_t>(runtime, rows), scratch<int64_t>(runtime, rows),
          zeros<int64_t>(runtime, V)};
}

// Links each row of a slice in a time block to the previous row with the same token.
template <class Storage>
inline void link_rows(const Layer<Storage>& layer, const TimeBlock& block, Slice slice,
                      const TokenRows& rows) {
  int64_t row = 0;
  for (int64_t t = block.first; t < block.last; ++t) {
    for (int64_t b = slice.begin; b < alive_end(layer.layout, t, slice); ++b, ++row) {
      const int64_t token = token_of(layer, t, b);
      // rows.last[token] may be left over from another time block. It is valid only if it is the
      // index of an earlier row of this time block with the same token.
      const int64_t last = rows.last[token];
      rows.before[row] = last < row && rows.token[last] == token ? last : -1;
      rows.token[row] = token;
      rows.last[token] = row;
    }
  }
}

constexpr int64_t kTokenChain = 16;  // rows to sum before adding the partial sum to the total

// Sums all rows of dz with the same token as row `last` (the last such row), and adds the result to
// `sum` [width]. Uses `width` columns, at most a panel, starting at column `first`. Summing short
// chains first loses less precision than adding each row to a large sum.
template <class Products, class Scalar>
inline void add_token_rows(const Products& products, const TokenRows& rows, int64_t last,
                           int64_t first, int64_t width, Scalar* sum) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  Vec<Scalar> total[Products::w / lanes] = {};
  for (int64_t row = last; row >= 0;) {
    Vec<Scalar> chain[Products::w / lanes] = {};
    for (int64_t i = 0; i < kTokenChain && row >= 0; ++i, row = rows.before[row]) {
      const auto dz = products.dz + (row * products.dz_stride + first);
      for_each_vector<Scalar>(
          width, [&](int64_t j, int64_t n) { chain[j / lanes] += load_upto(dz + j, n); });
    }
    for (int64_t v = 0; v < Products::w / lanes; ++v) total[v] += chain[v];
  }
  for_each_vector<Scalar>(width, [&](int64_t j, int64_t n) {
    store_upto(sum + j, load_upto(sum + j, n) + total[j / lanes], n);
  });
}

// For each token, adds the sum of dz over the time block's rows with that token to `blocks` of a
// table's gradient [V, stride]. Sets these blocks to zero first if `initial`.
template <class Products, class Scalar>
inline void add_table_gradient(const Products& products, const TokenRows& tokens,
                               const Blocks& blocks, bool initial, Share& share, int64_t V,
                               int64_t rows, Scalar* grad, int64_t stride) {
  constexpr int64_t w = Products::w;
  const int64_t H = products.H;
  const int64_t panels = (H + w - 1) / w;
  for (int64_t i = 0; i < blocks.count * panels; ++i) {
    if (!take(share)) continue;
    const int64_t j = i % panels * w;
    const int64_t first = (blocks.sum + i / panels) * products.dz_block + j;
    const int64_t width = min64(w, H - j);
    Scalar* sums = grad + (blocks.block + i / panels) * H + j;
    for (int64_t v = 0; initial && v < V; ++v) {
      fill_zeros(sums + v * stride, width);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = tokens.token[row];
      if (tokens.last[token] != row) continue;
      Scalar* sum = sums + token * stride;
      width == w ? add_token_rows(products, tokens, row, first, w, sum)
                 : add_token_rows(products, tokens, row, first, width, sum);
    }
  }
}

}  // namespace
}  // namespace namernn_fast
