// Matrix products on register tiles: C[M, width] = start + sum over operands of A[M, K] B[K,
// width].
//
// B is packed in panels: panel p holds columns p * panel_width .. of all K rows, row after row, the
// last one padded with zeros. A is read in place by two strides, so it may be rows of an output
// tensor or, with the strides exchanged, their transpose. Every element of C is summed in the same
// order, whatever the tile shape: results do not depend on how the work is split.
#pragma once

#include "simd-inl.h"

namespace namernn_fast {
namespace {

template <class Scalar>
struct Shape {
  static constexpr int lanes = Simd<Scalar>::lanes;
  static constexpr int panel_vectors = NAMERNN_REGISTERS >= 32 ? 4 : 2;
  static constexpr int panel_width = panel_vectors * lanes;
  static constexpr int max_rows = 6;
  // Few rows leave registers for more columns, which hides the multiply-add's latency.
  static constexpr int max_vectors(int rows) {
    return rows == 1 ? 8 : rows == 2 && NAMERNN_REGISTERS >= 32 ? 8 : rows == 2 ? 4 : panel_vectors;
  }
};

template <class Scalar>
inline int64_t panel_count(int64_t width) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  return (width + w - 1) / w;
}

// Elements of the panels of a [K, width] matrix.
template <class Scalar>
inline int64_t panels_size(int64_t K, int64_t width) {
  return panel_count<Scalar>(width) * K * Shape<Scalar>::panel_width;
}

template <class Scalar>
struct Operand {
  const Scalar* a;  // element (i, k) is a[i * a_row + k * a_k]
  int64_t a_row;
  int64_t a_k;  // 1 unless the product is by column
  const Scalar* panels;
  int64_t panel_size;  // elements from one panel to the next
  int64_t K;
  int64_t chain = kChain;
};

// What an accumulator starts from and where it ends.
template <class Scalar>
struct Target {
  Scalar* c;  // element (i, j) is c[i * c_row + j]
  int64_t c_row;
  const Scalar* start;  // element (i, j) is start[i * start_row + j]; null: zero
  int64_t start_row;
  bool add;  // add to C instead of writing it
};

// The products over k in first .. last, from zero.
template <class Scalar, int kRows, int kVectors, bool kByColumn>
inline void chain(Vec<Scalar> (&acc)[kRows][kVectors], const Operand<Scalar>& operand, int64_t i,
                  int64_t j, int64_t first, int64_t last) {
  constexpr int lanes = Simd<Scalar>::lanes;
  constexpr int per_panel = Shape<Scalar>::panel_vectors;
  const int64_t a_row = kByColumn ? 1 : operand.a_row;
  const int64_t a_k = kByColumn ? operand.a_k : 1;
  const Scalar* a = operand.a + i * a_row + first * a_k;
  const Scalar* panel = operand.panels + j / Shape<Scalar>::panel_width * operand.panel_size +
                        first * Shape<Scalar>::panel_width;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec<Scalar>{};
  }
#pragma GCC unroll 8
  for (int64_t k = first; k < last; ++k) {
    Vec<Scalar> b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      b[v] = load(panel + (v / per_panel) * operand.panel_size + (v % per_panel) * lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Scalar ar = a[r * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] += b[v] * ar;
    }
    a += a_k;
    panel += Shape<Scalar>::panel_width;
  }
}

// One tile at row i and column j of C; `width` columns of it exist. Between chains the sum waits in
// C, or, where it is to be added to C, beside it.
template <class Scalar, int kRows, int kVectors, bool kByColumn>
void tile(const Operand<Scalar>* operands, int count, const Target<Scalar>& target, int64_t i,
          int64_t j, int64_t width) {
  constexpr int lanes = Simd<Scalar>::lanes;
  const int64_t last = width - (kVectors - 1) * lanes;  // columns in the last vector
  alignas(64) Scalar beside[kRows * kVectors * lanes];
  Scalar* const c = target.add ? beside : target.c + i * target.c_row + j;
  const int64_t c_row = target.add ? kVectors * lanes : target.c_row;
  const Scalar* base = target.start ? target.start + i * target.start_row + j : c;
  int64_t base_row = target.start ? target.start_row : c_row;
  bool zero = !target.start;
  const auto end_chain = [&](const Vec<Scalar>(&acc)[kRows][kVectors]) {
    if (last == lanes && !zero) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          store(c + r * c_row + v * lanes, load(base + r * base_row + v * lanes) + acc[r][v]);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = v < kVectors - 1 ? lanes : last;
          const Vec<Scalar> sum =
              zero ? acc[r][v] : load_upto(base + r * base_row + v * lanes, n) + acc[r][v];
          store_upto(c + r * c_row + v * lanes, sum, n);
        }
      }
    }
    base = c;
    base_row = c_row;
    zero = false;
  };
  for (int o = 0; o < count; ++o) {
    const Operand<Scalar>& operand = operands[o];
    for (int64_t k = 0; k < operand.K; k += operand.chain) {
      Vec<Scalar> acc[kRows][kVectors];
      const int64_t end = k + operand.chain < operand.K ? k + operand.chain : operand.K;
      chain<Scalar, kRows, kVectors, kByColumn>(acc, operand, i, j, k, end);
      end_chain(acc);
    }
  }
  if (zero || base != c) {  // nothing to sum up
    const Vec<Scalar> nothing[kRows][kVectors] = {};
    end_chain(nothing);
  }
  for (int r = 0; target.add && r < kRows; ++r) {
    Scalar* row = target.c + (i + r) * target.c_row + j;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = v < kVectors - 1 ? lanes : last;
      store_upto(row + v * lanes, load_upto(row + v * lanes, n) + load(c + r * c_row + v * lanes),
                 n);
    }
  }
}

template <class Scalar>
using Tile = void (*)(const Operand<Scalar>*, int, const Target<Scalar>&, int64_t, int64_t,
                      int64_t);

template <class Scalar, bool kByColumn, int kRows, int... kVector>
inline Tile<Scalar> pick_vectors(int64_t vectors, std::integer_sequence<int, kVector...>) {
  static constexpr Tile<Scalar> table[] = {&tile<Scalar, kRows, kVector + 1, kByColumn>...};
  return table[vectors - 1];
}

template <class Scalar, bool kByColumn, int... kRow>
inline Tile<Scalar> pick_tile(int64_t rows, int64_t vectors, std::integer_sequence<int, kRow...>) {
  Tile<Scalar> found = nullptr;
  ((rows == kRow + 1 &&
    (found = pick_vectors<Scalar, kByColumn, kRow + 1>(
         vectors, std::make_integer_sequence<int, Shape<Scalar>::max_vectors(kRow + 1)>()))) ||
   ...);
  return found;
}

// A `finish` that has nothing to do.
struct Nothing {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// Columns [first, last) of C, both multiples of the panel width or the end. M rows are cut into
// tiles of equal height, give or take one, so no thin tile is left over. `finish(i, j, rows,
// columns)` is called on every block of C while it is in the nearest cache.
template <class Scalar, bool kByColumn, class Finish>
inline void product(const Operand<Scalar>* operands, int count, const Target<Scalar>& target,
                    int64_t M, int64_t first, int64_t last, Finish&& finish) {
  using S = Shape<Scalar>;
  constexpr auto row_sizes = std::make_integer_sequence<int, S::max_rows>();
  if (M <= 0) return;
  const int64_t tiles = (M + S::max_rows - 1) / S::max_rows;
  const int64_t low = M / tiles;
  const int64_t tall = M % tiles;  // the first `tall` tiles have low + 1 rows
  const int64_t step = S::max_vectors(low + (tall > 0)) * S::lanes;
  for (int64_t j = first; j < last; j += step) {
    const int64_t width = last - j < step ? last - j : step;
    const int64_t vectors = (width + S::lanes - 1) / S::lanes;
    const Tile<Scalar> low_tile = pick_tile<Scalar, kByColumn>(low, vectors, row_sizes);
    const Tile<Scalar> tall_tile =
        tall ? pick_tile<Scalar, kByColumn>(low + 1, vectors, row_sizes) : low_tile;
    for (int64_t n = 0, i = 0; n < tiles; ++n) {
      const int64_t rows = low + (n < tall);
      (n < tall ? tall_tile : low_tile)(operands, count, target, i, j, width);
      finish(i, j, rows, width);
      i += rows;
    }
  }
}

// The transpose of the first `rows` rows and n columns of W, as n rows of a panel. With constant
// arguments all of it stays in registers.
template <class Scalar, class Storage>
inline void pack_block(const Storage* w, int64_t w_row, int64_t rows, int64_t n, Scalar* panel) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  Vec<Scalar> block[lanes];
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; ++r) {
    block[r] = r < rows ? load_upto(w + r * w_row, n) : Vec<Scalar>{};
  }
  transpose<Scalar>(block);
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; ++r) {
    if (r < n) store(panel + r * Shape<Scalar>::panel_width, block[r]);
  }
}

// Panel of W^T for columns first .. of a row-major W [width, K].
template <class Scalar, class Storage>
inline void pack_transposed(const Storage* w, int64_t K, int64_t width, int64_t first,
                            Scalar* panel) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  constexpr int64_t panel_width = Shape<Scalar>::panel_width;
  for (int64_t j = 0; j < panel_width; j += lanes) {
    const int64_t rows = width - (first + j);
    const Storage* source = w + (first + j) * K;
    for_each_vector<Scalar>(K, [&](int64_t k, int64_t n) {
      Scalar* target = panel + k * panel_width + j;
      if (rows >= lanes && n == lanes) {
        pack_block(source + k, K, lanes, lanes, target);
      } else {
        pack_block(source + k, K, rows, n, target);
      }
    });
  }
}

// One row of a panel: columns first .. of a row of `width` elements, zero past its end.
template <class Scalar, class Storage>
inline void pack_row(const Storage* row, int64_t width, int64_t first, Scalar* panel_row) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  for (int64_t j = 0; j < Shape<Scalar>::panel_width; j += lanes) {
    const int64_t n = width - (first + j);
    store(panel_row + j,
          !row || n <= 0 ? Vec<Scalar>{} : load_upto(row + first + j, n < lanes ? n : lanes));
  }
}

// Panel of W for columns first .. of a row-major W [K, width].
template <class Scalar, class Storage>
inline void pack(const Storage* w, int64_t K, int64_t width, int64_t first, Scalar* panel) {
  for (int64_t k = 0; k < K; ++k) {
    pack_row(w + k * width, width, first, panel + k * Shape<Scalar>::panel_width);
  }
}

// acc[r] += W[r, K] x[K], lane by lane, for a vector's worth of rows of a row-major W whose rows
// are whole vectors: for a single x, where packing W would cost as much as several products with
// it.
template <class Scalar>
inline void accumulate_rows(const Scalar* w, int64_t K, const Scalar* x,
                            Vec<Scalar> (&acc)[Simd<Scalar>::lanes]) {
  constexpr int lanes = Simd<Scalar>::lanes;
  for (int64_t k = 0; k < K; k += lanes) {
    const Vec<Scalar> xk = load(x + k);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) acc[r] += load(w + r * K + k) * xk;
  }
}

// Lane r of the result is the sum of the lanes of acc[r].
template <class Scalar>
inline Vec<Scalar> sum_lanes(Vec<Scalar> (&acc)[Simd<Scalar>::lanes]) {
  constexpr int lanes = Simd<Scalar>::lanes;
  transpose<Scalar>(acc);
#pragma GCC unroll 4
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma GCC unroll 16
    for (int r = 0; r < distance; ++r) acc[r] += acc[r + distance];
  }
  return acc[0];
}

template <class Storage, class Scalar = Compute<Storage>>
inline bool all_finite(const Storage* p, int64_t n) {
  Vec<Scalar> sum = {};
  for_each_vector<Scalar>(n, [&](int64_t i, int64_t m) { sum += load_upto(p + i, m) * Scalar(0); });
  bool finite = true;  // zero times a finite number is zero, and NaN otherwise
  for (int l = 0; l < Simd<Scalar>::lanes; ++l) finite &= sum[l] == Scalar(0);
  return finite;
}

}  // namespace
}  // namespace namernn_fast
