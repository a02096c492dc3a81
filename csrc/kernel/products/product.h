// Computes matrix products on register tiles: C[M, width] = start + the sum over all operands of
// A[M, K] B[K, width].
//
// B is stored in panels. A is read in place with two strides, so A can be the rows of an output
// tensor or, with the strides swapped, the transpose of such rows. The order of summation is the
// same for every tile shape, so results do not depend on how the work is split.
#pragma once

#include <type_traits>

#include "expect.h"
#include "kernel/products/panels.h"

namespace namernn_fast {
namespace {

// The operands of one product A B. The panels of B may be stored in 16 bits.
template <class Scalar, class Panel = Scalar>
struct Operand {
  const Scalar* a;  // element (i, k) is a[i * a_row + k * a_k]
  int64_t a_row;
  const Panel* panels;
  int64_t panel_size;  // stride between panels, in elements
  int64_t K;
  int64_t chain = kChain;  // maximum chain length; see kChain
  // The panel that will be read after the product. Unless it is null, each panel is prefetched into
  // the core's private cache while the previous panel is in use.
  const Panel* after = nullptr;
  int64_t a_k = 1;  // read only if kByColumn; a_row must be 1 then
};

// Memory for a tile to prefetch while it computes: the cache lines at next .. end.
struct Ahead {
  const char* next;
  const char* end;
};
constexpr int64_t kCacheLine = 64;

// Number of steps of a chain between two prefetches. A tile that prefetched all its lines at once
// would stall on some of them.
constexpr int64_t kPrefetchSteps = 4;

// Number of chain steps to unroll. With 16 vector registers, a tile occupies 15. If its steps were
// unrolled, GCC would load operands of the next step early and spill sums to make room.
constexpr int kPrefetchUnroll = NAMERNN_REGISTERS >= 32 ? kPrefetchSteps : 1;

// Maximum number of tiles that share the prefetching of a panel.
constexpr int64_t kMostPrefetchingTiles = 32;

// Returns the cache lines of `panel` (K rows) that tile n of `tiles` tiles prefetches.
template <class Scalar>
inline Ahead ahead_in(const void* panel, int64_t K, int64_t n, int64_t tiles) {
  const int64_t lines = K * Shape<Scalar>::panel_width * int64_t(sizeof(Scalar)) / kCacheLine;
  const auto* start = static_cast<const char*>(panel);
  return {start + lines * n / tiles * kCacheLine, start + lines * (n + 1) / tiles * kCacheLine};
}

// Prefetches up to `lines` cache lines.
inline void prefetch(Ahead& ahead, int64_t lines) {
  for (; lines > 0 && ahead.next < ahead.end; --lines, ahead.next += kCacheLine) {
    __builtin_prefetch(ahead.next, 0, 2);
  }
}

// The start values of the sums, and where the sums are stored.
template <class Scalar>
struct Target {
  Scalar* c;  // element (i, j) is c[i * c_row + j]
  int64_t c_row;
  const Scalar* start;  // element (i, j) is start[i * start_row + j]; null means zeros
  int64_t start_row;
  bool add;  // whether to add to C instead of overwriting it
  // Unless null, replaces `start`: element (i, j) is starts[i][j].
  const Scalar* const* starts = nullptr;
};

// Computes one chain for the tile that starts at (i, j): sets `acc` to the sum of the products over
// k in first .. last. If kPrefetch, prefetches `lines` cache lines per kPrefetchSteps steps.
template <class Scalar, class Panel, int kRows, int kVectors, bool kByColumn, bool kPrefetch>
inline void chain(Vec<Scalar> (&acc)[kRows][kVectors], const Operand<Scalar, Panel>& operand,
                  int64_t i, int64_t j, int64_t first, int64_t last, [[maybe_unused]] Ahead& ahead,
                  [[maybe_unused]] int64_t lines) {
  constexpr int lanes = Simd<Scalar>::lanes;
  constexpr int per_panel = Shape<Scalar>::panel_vectors;
  const int64_t a_row = kByColumn ? 1 : operand.a_row;
  const int64_t a_k = kByColumn ? operand.a_k : 1;
  const Scalar* a = operand.a + i * a_row + first * a_k;
  const Panel* panel = operand.panels + j / Shape<Scalar>::panel_width * operand.panel_size +
                       first * Shape<Scalar>::panel_width;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec<Scalar>{};
  }
  const auto step = [&] {
    Vec<Scalar> b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Panel* from = panel + (v / per_panel) * operand.panel_size + (v % per_panel) * lanes;
      b[v] = load_upto(from, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Scalar ar = a[r * a_row];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) acc[r][v] += b[v] * ar;
    }
    a += a_k;
    panel += Shape<Scalar>::panel_width;
  };
  int64_t k = first;
  for (; kPrefetch && k + kPrefetchSteps <= last; k += kPrefetchSteps) {
    prefetch(ahead, lines);
#pragma GCC unroll kPrefetchUnroll
    for (int64_t n = 0; n < kPrefetchSteps; ++n) step();
  }
#pragma GCC unroll 8
  for (; k < last; ++k) step();
}

// Computes the tile at row i and column j of C. Only the first `width` columns of the tile exist.
// Between chains, the partial sums are stored in C or, if the product is added to C, in `buffer`.
// If kPrefetch, `ahead` holds what to prefetch for each operand; otherwise it is not read.
template <class Scalar, class Panel, int kRows, int kVectors, bool kByColumn,
          bool kPrefetch = false>
void tile(const Operand<Scalar, Panel>* operands, int count, const Target<Scalar>& target,
          int64_t i, int64_t j, int64_t width, [[maybe_unused]] const Ahead* ahead) {
  constexpr int lanes = Simd<Scalar>::lanes;
  const int64_t last = width - (kVectors - 1) * lanes;  // columns in the last vector
  alignas(64) Scalar buffer[kRows * kVectors * lanes];
  for (int r = 0; target.add && r < kRows; ++r) {  // C is read after the last chain
    const Scalar* row = target.c + (i + r) * target.c_row + j;
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(row + v * lanes, 1, 2);
  }
  Scalar* const c = target.add ? buffer : target.c + i * target.c_row + j;
  const int64_t c_row = target.add ? kVectors * lanes : target.c_row;
  const Scalar* base[kRows];  // the rows to which the next chain is added
  for (int r = 0; r < kRows; ++r) {
    base[r] = target.starts  ? target.starts[i + r] + j
              : target.start ? target.start + (i + r) * target.start_row + j
                             : c + r * c_row;
  }
  bool zero = !target.starts && !target.start;
  const auto end_chain = [&](const Vec<Scalar>(&acc)[kRows][kVectors]) {
    if (last == lanes && !zero) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          store(c + r * c_row + v * lanes, load(base[r] + v * lanes) + acc[r][v]);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const int64_t n = v < kVectors - 1 ? lanes : last;
          const Vec<Scalar> sum = zero ? acc[r][v] : load_upto(base[r] + v * lanes, n) + acc[r][v];
          store_upto(c + r * c_row + v * lanes, sum, n);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) base[r] = c + r * c_row;
    zero = false;
  };
  for (int o = 0; o < count; ++o) {
    const Operand<Scalar, Panel>& operand = operands[o];
    [[maybe_unused]] int64_t lines = 0;  // cache lines to prefetch per kPrefetchSteps steps
    if constexpr (kPrefetch) {
      lines = (ahead[o].end - ahead[o].next) / kCacheLine * kPrefetchSteps / (operand.K + 1) + 1;
    }
    Ahead rest = kPrefetch ? ahead[o] : Ahead{};
    for (int64_t k = 0; k < operand.K; k += operand.chain) {
      Vec<Scalar> acc[kRows][kVectors];
      const int64_t end = k + operand.chain < operand.K ? k + operand.chain : operand.K;
      chain<Scalar, Panel, kRows, kVectors, kByColumn, kPrefetch>(acc, operand, i, j, k, end, rest,
                                                                  lines);
      end_chain(acc);
    }
  }
  if (zero || base[0] != c) {  // no chain ran, because every K is 0
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

template <class Scalar, class Panel>
using Tile = void (*)(const Operand<Scalar, Panel>*, int, const Target<Scalar>&, int64_t, int64_t,
                      int64_t, const Ahead*);

// Returns the tile function for kRows rows and a number of vectors that is known only at run time.
template <class Scalar, class Panel, bool kByColumn, int kRows, int... kVector>
inline Tile<Scalar, Panel> pick_vectors(int64_t vectors, std::integer_sequence<int, kVector...>) {
  static constexpr Tile<Scalar, Panel> table[] = {
      &tile<Scalar, Panel, kRows, kVector + 1, kByColumn>...};
  return table[vectors - 1];
}

// Returns the tile function for numbers of rows and vectors that are known only at run time.
template <class Scalar, class Panel, bool kByColumn, int... kRow>
inline Tile<Scalar, Panel> pick_tile(int64_t rows, int64_t vectors,
                                     std::integer_sequence<int, kRow...>) {
  Tile<Scalar, Panel> found = nullptr;
  ((rows == kRow + 1 &&
    (found = pick_vectors<Scalar, Panel, kByColumn, kRow + 1>(
         vectors, std::make_integer_sequence<int, Shape<Scalar>::max_vectors(kRow + 1)>()))) ||
   ...);
  return found;
}

// Returns the prefetching tile function for `rows` rows and a whole panel. Only products with
// several tiles prefetch; each of their tiles has at least half of the maximum number of rows.
template <class Scalar, int... kFewer>
inline Tile<Scalar, Scalar> pick_prefetching_tile(int64_t rows,
                                                  std::integer_sequence<int, kFewer...>) {
  using S = Shape<Scalar>;
  static constexpr Tile<Scalar, Scalar> table[] = {
      &tile<Scalar, Scalar, S::max_rows - kFewer, S::panel_vectors, false, true>...};
  return table[S::max_rows - rows];
}

// Number of rows after which product() calls `finish`. With more rows at once, the processor
// computes more nonlinearities at the same time.
constexpr int64_t kFinishedRows = 8 * kTileRows;

// Pass this as `finish` to product() or product_in_place() if nothing is left to do.
struct NoFinish {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// Computes columns first .. last of C. Each of `first` and `last` must be a multiple of the panel
// width or the width of C. The M rows are split into tiles whose heights differ by at most one, so
// that no thin tile is left over. Calls finish(i, j, rows, columns) for a few tiles of C at a time,
// while they are in the L1 cache.
template <class Scalar, bool kByColumn = false, class Panel, class Finish>
inline void product(const Operand<Scalar, Panel>* operands, int count, const Target<Scalar>& target,
                    int64_t M, int64_t first, int64_t last, Finish&& finish) {
  using S = Shape<Scalar>;
  constexpr bool narrow = !std::is_same_v<Panel, Scalar>;
  constexpr auto row_sizes = std::make_integer_sequence<int, S::max_rows>();
  if (M <= 0) return;
  const int64_t tiles = (M + S::max_rows - 1) / S::max_rows;
  const int64_t low = M / tiles;
  const int64_t tall = M % tiles;  // the first `tall` tiles have low + 1 rows
  const int64_t tile_width = S::max_vectors(low + (tall > 0)) * S::lanes;
  for (int64_t j = first; j < last; j += tile_width) {
    const int64_t width = last - j < tile_width ? last - j : tile_width;
    const int64_t vectors = (width + S::lanes - 1) / S::lanes;
    // Prefetching gains nothing for a single tile (bandwidth-bound) or for very many tiles.
    const bool prefetches = !narrow && !kByColumn && tiles > 1 && tiles <= kMostPrefetchingTiles &&
                            count > 0 && operands[0].after && width == S::panel_width;
    const auto pick = [&](int64_t rows) {
      if constexpr (!narrow) {
        constexpr auto half_sizes = std::make_integer_sequence<int, (S::max_rows + 1) / 2 + 1>();
        if (prefetches) return pick_prefetching_tile<Scalar>(rows, half_sizes);
      }
      return pick_tile<Scalar, Panel, kByColumn>(rows, vectors, row_sizes);
    };
    const Tile<Scalar, Panel> low_tile = pick(low);
    const Tile<Scalar, Panel> tall_tile = tall ? pick(low + 1) : low_tile;
    int64_t finished = 0;  // rows of C for which finish() was called
    for (int64_t n = 0, i = 0; n < tiles; ++n) {
      const int64_t rows = low + (n < tall);
      Ahead ahead[2];
      for (int o = 0; o < count && prefetches; ++o) {
        const Operand<Scalar, Panel>& operand = operands[o];
        const int64_t panel = (j + tile_width) / S::panel_width;
        const Panel* next =
            j + tile_width < last ? operand.panels + panel * operand.panel_size : operand.after;
        ahead[o] = ahead_in<Scalar>(next, operand.K, n, tiles);
      }
      (n < tall ? tall_tile : low_tile)(operands, count, target, i, j, width, ahead);
      i += rows;
      if (i - finished >= kFinishedRows || n + 1 == tiles) {
        finish(finished, j, i - finished, width);
        finished = i;
      }
    }
  }
}

}  // namespace
}  // namespace namernn_fast
