// Computes products with row-major weights as the caller stores them:
// C[M, width] = start + A[M, K] W^T. If A has few rows, packing W into panels would take longer
// than the product.
//
// An element of C is the dot product of a row of A and a row of W, summed lane by lane and then
// across lanes. The order of summation depends only on K, so results do not depend on how the work
// is split.
#pragma once

#include "kernel/math/half.h"
#include "kernel/products/product.h"

namespace namernn_fast {
namespace {

template <class Scalar, class Storage>
struct OperandInPlace {
  const Scalar* a;  // element (i, k) is a[i * a_row + k]
  int64_t a_row;
  const Storage* w;  // [width, K]
  int64_t K;
};

// The maximum numbers of rows of A (`max_rows`) and of W (`columns`) that are multiplied at once.
// `columns` is small because each row of W is a separate stream from memory.
template <class Scalar>
struct InPlaceShape {
  static constexpr int max_rows = NAMERNN_REGISTERS >= 32 ? 6 : 3;
  static constexpr int columns(int rows) {
    const int most = rows <= (NAMERNN_REGISTERS >= 32 ? 3 : 1) ? 8 : 4;
    return most < Simd<Scalar>::lanes ? most : Simd<Scalar>::lanes;
  }
};

// Adds a[r, k] w[c, k] to acc[r][c] for k in first .. last, lane by lane. Prefetches a cache line
// of `ahead` per vector.
template <class Scalar, class Storage, int kRows, int kColumns>
inline void add_products(const Scalar* a, int64_t a_row, const Storage* const (&w)[kColumns],
                         int64_t first, int64_t last, Vec<Scalar> (&acc)[kRows][kColumns],
                         Ahead& ahead) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  const auto add = [&](int64_t k, int64_t n) {
    Vec<Scalar> ak[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) ak[r] = load_upto(a + r * a_row + k, n);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vec<Scalar> wk = load_upto(w[c] + k, n);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][c] += wk * ak[r];
    }
  };
  int64_t k = first;
  for (; k + lanes <= last; k += lanes) {
    prefetch(ahead, 1);
    add(k, lanes);
  }
  if (k < last) add(k, last - k);
}

// Sums the vectors of `acc` into acc[0] by repeatedly adding the upper half to the lower half.
template <class Scalar, int kDistance = Simd<Scalar>::lanes / 2>
[[gnu::always_inline]] inline void add_by_halves(Vec<Scalar> (&acc)[Simd<Scalar>::lanes]) {
#pragma GCC unroll 16
  for (int r = 0; r < kDistance; ++r) acc[r] += acc[r + kDistance];
  if constexpr (kDistance > 1) add_by_halves<Scalar, kDistance / 2>(acc);
}

// Returns a vector whose lane r is the sum of the lanes of acc[r].
template <class Scalar>
[[gnu::always_inline]] inline Vec<Scalar> sum_lanes(Vec<Scalar> (&acc)[Simd<Scalar>::lanes]) {
  transpose<Scalar>(acc);
  add_by_halves<Scalar>(acc);
  return acc[0];
}

// Computes the tile at row i and column j of C. The tile has kRows rows and as many columns as a
// vector has lanes, but only the first `width` columns exist. Prefetches `ahead`.
template <class Scalar, class Storage, int kRows>
void tile_in_place(const OperandInPlace<Scalar, Storage>& operand, const Target<Scalar>& target,
                   int64_t i, int64_t j, int64_t width, Ahead ahead) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  constexpr int columns = InPlaceShape<Scalar>::columns(kRows);
  const int64_t K = operand.K;
  Vec<Scalar> sums[kRows][lanes] = {};
  // Multiplies each chunk of A by all rows of W, so that the chunk stays in the L1 cache.
  for (int64_t k = 0; k < K; k += kChain * lanes) {
    for (int64_t c = 0; c < width; c += columns) {
      const Storage* w[columns];
      for (int64_t d = 0; d < columns; ++d) {
        w[d] = operand.w + (j + min64(c + d, width - 1)) * K;  // past the end, repeats the last row
      }
      Vec<Scalar> acc[kRows][columns] = {};
      add_products(operand.a + i * operand.a_row, operand.a_row, w, k, min64(K, k + kChain * lanes),
                   acc, ahead);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int d = 0; d < columns; ++d) sums[r][c + d] += acc[r][d];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    const Scalar* start = target.starts  ? target.starts[i + r] + j
                          : target.start ? target.start + (i + r) * target.start_row + j
                                         : nullptr;
    const Vec<Scalar> sum = sum_lanes<Scalar>(sums[r]);
    store_upto(target.c + (i + r) * target.c_row + j, start ? load_upto(start, width) + sum : sum,
               width);
  }
}

// Returns the tile function for a number of rows that is known only at run time.
template <class Scalar, class Storage, int... kRow>
inline auto pick_in_place(int64_t rows, std::integer_sequence<int, kRow...>) {
  using Tile = void (*)(const OperandInPlace<Scalar, Storage>&, const Target<Scalar>&, int64_t,
                        int64_t, int64_t, Ahead);
  static constexpr Tile table[] = {&tile_in_place<Scalar, Storage, kRow + 1>...};
  return table[rows - 1];
}

// Computes columns first .. last of C. The M rows are split into tiles whose heights differ by at
// most one. If there are several tiles, each prefetches some of the next rows of W. A single tile
// would not benefit. Calls finish(i, j, rows, columns) for each tile of C while the tile is in the
// L1 cache.
template <class Scalar, class Storage, class Finish>
inline void product_in_place(const OperandInPlace<Scalar, Storage>& operand,
                             const Target<Scalar>& target, int64_t M, int64_t first, int64_t last,
                             Finish&& finish) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  constexpr int max_rows = InPlaceShape<Scalar>::max_rows;
  constexpr auto row_sizes = std::make_integer_sequence<int, max_rows>();
  const int64_t tiles = (M + max_rows - 1) / max_rows;
  for (int64_t j = first; j < last; j += lanes) {
    const int64_t width = min64(lanes, last - j);
    const int64_t next = j + width < last ? j + width : first;
    const int64_t bytes = min64(lanes, last - next) * operand.K * int64_t(sizeof(Storage));
    const auto* ahead = reinterpret_cast<const char*>(operand.w + next * operand.K);
    for (int64_t n = 0, i = 0; n < tiles; ++n) {
      const int64_t rows = M * (n + 1) / tiles - i;
      const Ahead share{ahead + bytes * n / tiles, ahead + bytes * (n + 1) / tiles};
      pick_in_place<Scalar, Storage>(rows, row_sizes)(operand, target, i, j, width,
                                                      tiles > 1 ? share : Ahead{});
      finish(i, j, rows, width);
      i += rows;
    }
  }
}

}  // namespace
}  // namespace namernn_fast
