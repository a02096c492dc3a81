// Stores matrices in panels, that is, in the order in which register tiles read the elements.
//
// Panel p of a [K, width] matrix holds its columns p * panel_width .. (p + 1) * panel_width, row by
// row. The last panel is padded with zeros.
#pragma once

#include "kernel/math/half.h"
#include "kernel/math/transpose.h"
#include "plan.h"

namespace namernn_fast {
namespace {

// The sizes of panels and register tiles, in elements, vectors and rows.
template <class Scalar>
struct Shape {
  static constexpr int lanes = Simd<Scalar>::lanes;
  static constexpr int panel_vectors = NAMERNN_REGISTERS >= 32 ? 4 : 2;
  static constexpr int panel_width = panel_vectors * lanes;
  static constexpr int max_rows = kTileRows;
  // Returns the maximum number of vectors per row of a tile with `rows` rows. Tiles with few rows
  // leave registers for more columns, which hide the latency of multiply-adds.
  static constexpr int max_vectors(int rows) {
    return rows == 1 ? 8 : rows == 2 && NAMERNN_REGISTERS >= 32 ? 8 : rows == 2 ? 4 : panel_vectors;
  }
};

// Returns the number of panels of a matrix with `width` columns.
template <class Scalar>
inline int64_t panel_count(int64_t width) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  return (width + w - 1) / w;
}

// Returns the number of elements in the panels of a [K, width] matrix.
template <class Scalar>
inline int64_t panels_size(int64_t K, int64_t width) {
  return panel_count<Scalar>(width) * K * Shape<Scalar>::panel_width;
}

// Transposes the first `rows` rows and n columns of W into n rows of a matrix, each one vector
// wide. If `rows` and n are compile-time constants, all elements stay in registers.
template <class Scalar, class Storage>
inline void transpose_square(const Storage* w, int64_t w_row, int64_t rows, int64_t n, Scalar* to,
                             int64_t to_row) {
  using Lane = Compute<Scalar>;
  constexpr int64_t lanes = Simd<Lane>::lanes;
  Vec<Lane> square[lanes];
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; ++r) {
    square[r] = r < rows ? load_upto(w + r * w_row, n) : Vec<Lane>{};
  }
  transpose<Lane>(square);
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; ++r) {
    if (r < n) store_upto(to + r * to_row, square[r], lanes);
  }
}

// Transposes W [rows, columns] into `columns` rows of `width` elements. Rounds `width` up to whole
// vectors and fills elements past `rows` with zeros.
template <class Scalar, class Storage>
inline void transpose_matrix(const Storage* w, int64_t w_row, int64_t rows, int64_t columns,
                             Scalar* to, int64_t to_row, int64_t width) {
  constexpr int64_t lanes = Simd<Compute<Scalar>>::lanes;
  for (int64_t i = 0; i < width; i += lanes) {
    for_each_vector<Compute<Scalar>>(columns, [&](int64_t j, int64_t n) {
      const Storage* from = w + i * w_row + j;
      Scalar* target = to + j * to_row + i;
      if (rows - i >= lanes && n == lanes) {
        transpose_square(from, w_row, lanes, lanes, target, to_row);
      } else {
        transpose_square(from, w_row, rows - i, n, target, to_row);
      }
    });
  }
}

// Packs the panel of W^T that starts at column `first`, from a row-major W [width, K].
template <class Scalar, class Storage>
inline void pack_transposed(const Storage* w, int64_t K, int64_t width, int64_t first,
                            Scalar* panel) {
  constexpr int64_t panel_width = Shape<Compute<Scalar>>::panel_width;
  transpose_matrix(w + first * K, K, width - first, K, panel, panel_width, panel_width);
}

// Packs one row of a panel: the elements of `row` [width], starting at column `first`, padded with
// zeros. If `row` is null, packs zeros.
template <class Scalar, class Storage>
inline void pack_row(const Storage* row, int64_t width, int64_t first, Scalar* panel_row) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  for (int64_t j = 0; j < Shape<Scalar>::panel_width; j += lanes) {
    const int64_t n = width - (first + j);
    store(panel_row + j,
          !row || n <= 0 ? Vec<Scalar>{} : load_upto(row + first + j, n < lanes ? n : lanes));
  }
}

// Packs the panel of W that starts at column `first`, from a row-major W [K, width].
template <class Scalar, class Storage>
inline void pack(const Storage* w, int64_t K, int64_t width, int64_t first, Scalar* panel) {
  for (int64_t k = 0; k < K; ++k) {
    pack_row(w + k * width, width, first, panel + k * Shape<Scalar>::panel_width);
  }
}

// Returns whether all n elements are finite. Relies on x * 0 being 0 if x is finite and NaN
// otherwise.
template <class Storage, class Scalar = Compute<Storage>>
inline bool all_finite(const Storage* p, int64_t n) {
  Vec<Scalar> sum = {};
  for_each_vector<Scalar>(n, [&](int64_t i, int64_t m) { sum += load_upto(p + i, m) * Scalar(0); });
  bool finite = true;
  for (int l = 0; l < Simd<Scalar>::lanes; ++l) finite &= sum[l] == Scalar(0);
  return finite;
}

}  // namespace
}  // namespace namernn_fast
