// The products of the backward pass in bfloat16, on instructions that multiply pairs of bfloat16:
// gradients dz are rounded to bfloat16, sums are float. See products_interface.h.
//
// dz is stored twice: by rows, to be multiplied with W_hh and W_ih, and transposed, to be
// multiplied with inputs and states for the weight gradients. Right operands are panels of pairs of
// rows. The sums of a weight gradient are stored in panels as well, as tiles to which each time
// block adds.
#pragma once

#include "kernel/backward.h"
#include "kernel/bfloat16_forward.h"

namespace namernn_fast {
namespace {

// Returns the stride for rows of n elements: an odd number of granules, so that the elements of a
// column use many cache sets.
inline int64_t odd_granules(int64_t n) { return (padded(n) / kGranule | 1) * kGranule; }

// Loads n pairs, each of an element of row a and one of row b. A null row stands for zeros.
inline Vec<float> load_pairs(const BFloat16* a, const BFloat16* b, int64_t n) {
  const Vec<float> low = a ? load_upto(a, n) : Vec<float>{};
  const Vec<float> high = b ? load_upto(b, n) : Vec<float>{};
  return (Vec<float>)((Word)low >> 16 | (Word)high);
}

inline void store_pairs(BFloat16* p, Vec<float> pairs) { std::memcpy(p, &pairs, sizeof(pairs)); }

// Packs one row of a panel of pairs: columns `first` and up of two rows of `width` elements, zeros
// past their end.
inline void pack_pair_row(const BFloat16* a, const BFloat16* b, int64_t width, int64_t first,
                          BFloat16* panel_row) {
  constexpr int64_t lanes = Simd<float>::lanes;
  for (int64_t j = 0; j < Shape<float>::panel_width; j += lanes) {
    const int64_t n = min64(lanes, width - (first + j));
    store_pairs(panel_row + 2 * j, n <= 0 ? Vec<float>{}
                                          : load_pairs(a + (first + j) * (a != nullptr),
                                                       b + (first + j) * (b != nullptr), n));
  }
}

// Packs one panel of W, columns `first` and up, from a row-major W [K, width]. The panel is
// [padded(K) / 2, panel_width, 2].
inline void pack_pair_rows(const BFloat16* w, int64_t K, int64_t width, int64_t first,
                           BFloat16* panel) {
  for (int64_t k = 0; k < padded(K); k += 2) {
    pack_pair_row(k < K ? w + k * width : nullptr, k + 1 < K ? w + (k + 1) * width : nullptr, width,
                  first, panel + k * Shape<float>::panel_width);
  }
}

// weight_hh as the backward recurrence on pairs reads it: panels of W_hh
// [padded(weight_blocks * H), H].
template <class Cell>
struct PairRecurrencePanels {
  static constexpr int64_t w = Shape<float>::panel_width;

  BFloat16* weights;

  static int64_t count(int64_t, int64_t H) { return panel_count<float>(H); }
  static size_t bytes(int64_t, int64_t H) {
    return panels_size<float>(padded(Cell::weight_blocks * H), H) * sizeof(BFloat16);
  }
  PairRecurrencePanels(void* memory, int64_t, int64_t) : weights(static_cast<BFloat16*>(memory)) {}
  void pack(const Layer<BFloat16>& layer, int64_t p) const {
    const int64_t K = Cell::weight_blocks * layer.H;
    pack_pair_rows(layer.weight_hh, K, layer.H, p * w, weights + p * padded(K) * w);
  }
};

// The rows of other tensors that belong to a row of dz.
struct PairRow {
  const BFloat16* previous;  // h_{t-1}, or null: zeros
  const BFloat16* input;
  BFloat16* grad_input;  // if it is wanted
};

// Lower limit of block_rows(): each time block reads and writes all gradient sums once.
constexpr int64_t kMinPairRows = 512;
constexpr int64_t kPairChunkRows = 256;  // rows of a time block that are multiplied per pass over C
static_assert(kOneProductRows <= kPairChunkRows && kOneProductRows <= kMinPairRows);

template <class Cell>
struct PairProducts {
  static_assert(Cell::sums == 1 && Cell::only_through_sums, "a row of dz is one block");
  using Storage = BFloat16;
  using Scalar = float;
  using Element = BFloat16;
  using Recurrence = PairRecurrencePanels<Cell>;
  static constexpr int64_t blocks = Cell::weight_blocks;
  static constexpr int64_t w = Shape<float>::panel_width;

  // Memory shared by all groups.
  BFloat16* weight_ih;  // panels of W_ih [padded(H), D], if grad_input is wanted
  // The members below belong to one group; prepare_rows() sets them.
  int64_t D;
  int64_t H;         // columns of dz
  int64_t capacity;  // maximum rows of a time block
  int64_t dz_stride;
  BFloat16* dz;             // [capacity + PairTile::rows, dz_stride]
  BFloat16* dz_transposed;  // [padded(H), capacity], if parameter gradients are wanted
  BFloat16* previous;       // panels of h_{t-1} [capacity, H], if parameter gradients are wanted
  BFloat16* input;          // panels of x [capacity, D], if parameter gradients are wanted
  PairRow* rows;            // [capacity]

  static int64_t block_rows(const Layer<BFloat16>& layer, const Runtime& runtime) {
    const int64_t row = (3 * layer.H + layer.D) * int64_t(sizeof(BFloat16));
    return choose_block_rows(row, kMinPairRows, runtime.machine);
  }

  // The sums of a gradient are stored in panels of [padded(H), width].
  static int64_t gradient_size(int64_t H, int64_t width) {
    return panels_size<float>(padded(H), width);
  }

  static void deliver_gradient(const float* sums, BFloat16* result, int64_t H, int64_t width,
                               const Runtime& runtime) {
    const double cost = kAddingCost * double(H) * double(width);
    const int64_t workers = choose_workers(cost, runtime.machine);
    run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
      for (int64_t i = H * begin / workers; i < H * end / workers; ++i) {
        for (int64_t j = 0; j < width; j += w) {
          convert(sums + j * padded(H) + i * w, result + i * width + j, min64(w, width - j));
        }
      }
    });
  }

  void prepare_input_gradient(const Layer<BFloat16>& layer, BFloat16*, const Plan&,
                              const Runtime& runtime) {
    weight_ih = scratch<BFloat16>(runtime, panels_size<float>(padded(layer.H), layer.D));
  }

  void pack_input_panel(const Layer<BFloat16>& layer, int64_t p) const {
    pack_pair_rows(layer.weight_ih, layer.H, layer.D, p * w, weight_ih + p * padded(layer.H) * w);
  }

  void prepare_rows(int64_t inputs, int64_t units, bool want_weights, int64_t block_rows,
                    const Runtime& runtime) {
    D = inputs;
    H = units;
    capacity = odd_granules(block_rows);
    dz_stride = odd_granules(H);
    dz = scratch<BFloat16>(runtime, (capacity + PairTile::rows) * dz_stride);
    for (int64_t row = 0; H < padded(H) && row < capacity; ++row) {
      std::memset(dz + row * dz_stride + H, 0, (padded(H) - H) * sizeof(BFloat16));
    }
    rows = scratch<PairRow>(runtime, capacity);
    if (want_weights) {
      dz_transposed = scratch<BFloat16>(runtime, padded(H) * capacity);
      previous = scratch<BFloat16>(runtime, panels_size<float>(capacity, H));
      input = scratch<BFloat16>(runtime, panels_size<float>(capacity, D));
    }
  }

  void keep_row(int64_t row, const BFloat16* h, const BFloat16* x, BFloat16* grad_input) const {
    rows[row] = {h, x, grad_input};
  }

  void step_back(int64_t row, const BFloat16* weight_hh, int64_t count, Columns columns,
                 float* grad_h) const {
    multiply_pairs(dz + row * dz_stride, dz_stride, H, count, weight_hh, columns,
                   [&](int64_t i, int64_t j, int64_t height, int64_t width, const float* sums) {
                     for (int64_t r = 0; r < height; ++r) {
                       convert(sums + r * w, grad_h + (i + r) * H + j, width);
                     }
                   });
  }

  // Transposes dz and packs previous states and inputs for the weight gradients, kGranule rows at a
  // time.
  void end_recurrence(int64_t count, const Part& part) const {
    if (!dz_transposed) return;
    for (int64_t first = part.member * kGranule; first < count; first += part.members * kGranule) {
      transpose_granule(first, count);
      pack_granule(first, count);
    }
  }

  void add_weight_gradient(Columns, bool initial, Share& share, int64_t zeros, int64_t count,
                           const BFloat16* panels, int64_t width, float* grad) const {
    static_assert(kTaskRows % PairTile::rows == 0);
    PairTile tile;
    const int64_t start = max64(0, min64(zeros, count - 1)) / kGranule * kGranule;
    for (int64_t j = 0; j < width; j += w) {
      for (int64_t task = 0; task < padded(H); task += kTaskRows) {
        if (!take(share)) continue;
        const int64_t end = min64(task + kTaskRows, padded(H));
        for (int64_t k = start; k < padded(count); k += kPairChunkRows) {
          const int64_t K = min64(kPairChunkRows, padded(count) - k);
          const BFloat16* panel = panels + j * capacity + k * w;
          for (int64_t i = task; i < end; i += PairTile::rows) {
            const BFloat16* a = dz_transposed + i * capacity + k;
            float* c = grad + j * padded(H) + i * w;
            const int64_t height = min64(PairTile::rows, end - i);
            initial&& k == start ? tile.multiply<false>(a, capacity, K, height, panel, c)
                                 : tile.multiply<true>(a, capacity, K, height, panel, c);
          }
        }
      }
    }
  }

  void write_weight_gradient(Columns, Share& share, int64_t zeros, int64_t count,
                             const BFloat16* panels, int64_t width, BFloat16* grad) const {
    PairTile tile;
    alignas(64) float sums[PairTile::rows * w];
    const int64_t start = max64(0, min64(zeros, count - 1)) / kGranule * kGranule;
    const int64_t K = padded(count) - start;
    for (int64_t i = 0; i < H; i += PairTile::rows) {
      if (!take(share)) continue;
      const int64_t height = min64(PairTile::rows, H - i);
      const BFloat16* a = dz_transposed + i * capacity + start;
      for (int64_t j = 0; j < width; j += w) {
        tile.multiply<false>(a, capacity, K, height, panels + j * capacity + start * w, sums);
        for (int64_t r = 0; r < height; ++r) {
          convert(sums + r * w, grad + (i + r) * width + j, min64(w, width - j));
        }
      }
    }
  }

  void write_input_gradient(const Backward<BFloat16>& args, const GroupRows& group,
                            const TimeBlock& block, Share& share, int64_t) const {
    const int64_t count = count_rows(group, block);
    for (int64_t first = 0; first < count; first += kTaskRows) {
      if (!take(share)) continue;
      multiply_pairs(dz + first * dz_stride, dz_stride, H, min64(kTaskRows, count - first),
                     weight_ih, Columns{0, D},
                     [&](int64_t i, int64_t j, int64_t height, int64_t width, const float* sums) {
                       for (int64_t r = 0; r < height; ++r) {
                         BFloat16* grad = rows[first + i + r].grad_input + j;
                         const float* sum = sums + r * w;
                         for_each_vector<float>(width, [&](int64_t c, int64_t n) {
                           const Vec<float> before =
                               args.accumulate_input ? load_upto(grad + c, n) : Vec<float>{};
                           store_upto(grad + c, before + load(sum + c), n);
                         });
                       }
                     });
    }
  }

 private:
  // Computes columns of A[count, padded(K)] B[K, ..]. Calls finish(i, j, height, width, sums) with
  // every tile [height, panel_width] of the product.
  template <class Finish>
  static void multiply_pairs(const BFloat16* a, int64_t a_row, int64_t K, int64_t count,
                             const BFloat16* panels, Columns columns, Finish&& finish) {
    PairTile tile;
    alignas(64) float sums[PairTile::rows * w];
    for (int64_t j = columns.first; j < columns.last; j += w) {
      for (int64_t i = 0; i < count; i += PairTile::rows) {
        const int64_t height = min64(PairTile::rows, count - i);
        tile.multiply<false>(a + i * a_row, a_row, padded(K), height, panels + j * padded(K), sums);
        finish(i, j, height, min64(w, columns.last - j), sums);
      }
    }
  }

  // Writes columns first .. first + kGranule of dz_transposed. Rows of dz from `count` on stand for
  // zeros.
  void transpose_granule(int64_t first, int64_t count) const {
    constexpr int64_t lanes = Simd<float>::lanes;
    const auto dz_row = [&](int64_t row) { return row < count ? dz + row * dz_stride : nullptr; };
    for (int64_t i = 0; i < padded(H); i += lanes) {
      Vec<float> square[lanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        const BFloat16* a = dz_row(first + 2 * r);
        const BFloat16* b = dz_row(first + 2 * r + 1);
        square[r] = load_pairs(a ? a + i : nullptr, b ? b + i : nullptr, lanes);
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        store_pairs(dz_transposed + (i + r) * capacity + first, square[r]);
      }
    }
  }

  // Packs rows first .. first + kGranule of the panels of previous states and of inputs.
  void pack_granule(int64_t first, int64_t count) const {
    for (int64_t row = first; row < first + kGranule; row += 2) {
      constexpr PairRow none{};
      const PairRow& a = row < count ? rows[row] : none;
      const PairRow& b = row + 1 < count ? rows[row + 1] : none;
      for (int64_t j = 0; j < H; j += w) {
        pack_pair_row(a.previous, b.previous, H, j, previous + j * capacity + row * w);
      }
      for (int64_t j = 0; j < D; j += w) {
        pack_pair_row(a.input, b.input, D, j, input + j * capacity + row * w);
      }
    }
  }
};

}  // namespace
}  // namespace namernn_fast
