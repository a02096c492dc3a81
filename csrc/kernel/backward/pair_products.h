// Computes the products of the backward pass with instructions that multiply pairs of bfloat16. The
// gradients dz are stored as terms (terms.h), like the other operands; sums are floats. See
// products_interface.h.
//
// dz is stored twice: row by row for the products dz W_hh and dz W_ih, and transposed for the
// weight gradients dz^T h_{t-1} and dz^T x. Each block of a row of dz is padded with zeros to a
// multiple of kGranule elements, so that a pair never spans two blocks. The right operand of each
// product is stored in panels of row pairs. The sums of a weight gradient are also stored in
// panels, and each time block adds to these sums tile by tile.
#pragma once

#include "kernel/backward/backward.h"
#include "kernel/weights/pair_panels.h"

namespace namernn_fast {
namespace {

// Returns the smallest stride of at least n elements that is an odd multiple of kGranule. Such a
// stride spreads the elements of a column over many cache sets.
inline int64_t odd_granules(int64_t n) { return (padded(n) / kGranule | 1) * kGranule; }

// Holds weight_hh in the format that the backward recurrence on pairs reads: panels of W_hh
// [gates * padded(H), H].
template <class Storage, int kTerms>
struct PairRecurrencePanels {
  static constexpr int64_t w = Shape<float>::panel_width;

  Terms<kTerms> weights;

  static int64_t count(const Layer<Storage>& layer) { return panel_count<float>(layer.H); }
  static int64_t size(const Layer<Storage>& layer) {
    return panels_size<float>(layer.cell->gates * padded(layer.H), layer.H);
  }
  static size_t bytes(const Layer<Storage>& layer) {
    return kTerms * size(layer) * sizeof(BFloat16);
  }
  PairRecurrencePanels(void* memory, const Layer<Storage>& layer)
      : weights{static_cast<BFloat16*>(memory), size(layer)} {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t H = layer.H, gates = layer.cell->gates;
    for (int64_t g = 0; g < gates; ++g) {
      pack_pair_rows(layer.parameters[kWeightHh] + g * H * H, H, H, p * w,
                     weights + (p * gates + g) * padded(H) * w);
    }
  }
};

// Pointers to the previous state, input and input gradient that belong to one row of dz.
template <class Storage>
struct PairRow {
  const Storage* previous;  // h_{t-1}; null means zeros
  const Storage* input;
  Storage* grad_input;  // null if not wanted
};

// Lower limit on the result of block_rows(). Every time block reads and writes all gradient sums
// once, so time blocks must not be too small.
constexpr int64_t kMinPairRows = 512;
constexpr int64_t kPairChunkRows = 256;  // maximum rows of dz in one product of a weight gradient
static_assert(kOneProductRows <= kPairChunkRows && kOneProductRows <= kMinPairRows);

template <class StorageType, int kTerms>
struct PairProducts {
  using Storage = StorageType;
  using Scalar = float;
  using Elements = Terms<kTerms>;
  using Recurrence = PairRecurrencePanels<Storage, kTerms>;
  static constexpr int64_t w = Shape<float>::panel_width;
  static constexpr size_t element_bytes = kTerms * sizeof(BFloat16);
  static constexpr bool sums_like_gradient = false;
  static constexpr bool can_project = false;
  static constexpr bool encodes_dz = true;

  const Cell* cell;
  // Shared by all groups: panels of W_ih [gates * padded(H), D], with blocks in the order of the
  // sums. Null unless grad_input is wanted.
  Elements weight_ih;
  // The members below belong to one group; prepare_rows() sets them.
  int64_t D;
  int64_t H;
  int64_t capacity;  // maximum number of rows in a time block
  int64_t dz_stride;
  int64_t dz_block;        // padded(H)
  Elements dz;             // [capacity + PairTile::rows, dz_stride]
  Elements dz_transposed;  // [sums * padded(H), capacity]; null unless weight gradients are wanted
  // Panels of h_{t-1} [capacity, H] and x [capacity, D]; null unless weight gradients are wanted.
  Elements previous;
  Elements input;
  PairRow<Storage>* rows;  // [capacity]
  float* dz_row;           // [sums, dz_block], one row of dz in float, as the cell writes it

  static int64_t block_rows(const Layer<Storage>& layer, const Runtime& runtime) {
    const int64_t row = ((1 + 2 * layer.cell->sums) * layer.H + layer.D) * int64_t(element_bytes);
    return choose_block_rows(row, kMinPairRows, runtime.machine);
  }

  // Returns the number of elements in the sums of a weight gradient, which are stored in panels of
  // [blocks * padded(H), width].
  static int64_t gradient_size(int64_t H, int64_t blocks, int64_t width) {
    return panels_size<float>(blocks * padded(H), width);
  }

  static void deliver_gradient(const float* sums, Storage* result, int64_t H, int64_t blocks,
                               int64_t width, const Runtime& runtime) {
    const int64_t rows = blocks * H;
    const double cost = kAddingCost * double(rows) * double(width);
    const int64_t workers = choose_workers(cost, runtime.machine);
    run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
      for (int64_t i = rows * begin / workers; i < rows * end / workers; ++i) {
        const float* row = sums + (i / H * padded(H) + i % H) * w;
        for (int64_t j = 0; j < width; j += w) {
          convert(row + j * blocks * padded(H), result + i * width + j, min64(w, width - j));
        }
      }
    });
  }

  void prepare_input_gradient(const Layer<Storage>& layer, void*, const Plan&,
                              const Runtime& runtime) {
    const int64_t rows = layer.cell->gates * padded(layer.H);
    weight_ih = scratch_terms<kTerms>(runtime, panels_size<float>(rows, layer.D));
  }

  void pack_input_panel(const Layer<Storage>& layer, int64_t p) const {
    const Cell& cell = *layer.cell;
    for (int64_t s = 0; s < cell.gates; ++s) {
      const int64_t at = cell.input_block[s] * layer.H * layer.D;
      const Storage* block = layer.parameters[kWeightIh] + at;
      pack_pair_rows(block, layer.H, layer.D, p * w,
                     weight_ih + (p * cell.gates + s) * padded(layer.H) * w);
    }
  }

  void prepare_rows(const Layer<Storage>& layer, bool want_weights, int64_t block_rows,
                    const Runtime& runtime) {
    cell = layer.cell;
    D = layer.D;
    H = layer.H;
    capacity = odd_granules(block_rows);
    dz_block = padded(H);
    dz_stride = odd_granules(cell->sums * dz_block);
    dz = scratch_terms<kTerms>(runtime, (capacity + PairTile::rows) * dz_stride);
    for (int64_t row = 0; H < dz_block && row < capacity; ++row) {
      for (int64_t s = 0; s < cell->sums; ++s) {
        fill_zeros(dz + (row * dz_stride + s * dz_block + H), dz_block - H);
      }
    }
    rows = scratch<PairRow<Storage>>(runtime, capacity);
    dz_row = scratch<float>(runtime, cell->sums * dz_block);
    if (want_weights) {
      dz_transposed = scratch_terms<kTerms>(runtime, cell->sums * dz_block * capacity);
      previous = scratch_terms<kTerms>(runtime, panels_size<float>(capacity, H));
      input = scratch_terms<kTerms>(runtime, panels_size<float>(capacity, D));
    }
  }

  float* dz_rows(int64_t, int64_t first) const { return dz_row + first; }
  void store_dz(int64_t row, Columns columns) const {
    for (int64_t s = 0; s < cell->sums; ++s) {
      const int64_t first = s * dz_block + columns.first;
      convert(dz_row + first, dz + (row * dz_stride + first), columns.last - columns.first);
    }
  }

  void keep_row(int64_t row, const Storage* h, const Storage* x, Storage* grad_input) const {
    rows[row] = {h, x, grad_input};
  }

  void step_back(int64_t row, const Elements& weight_hh, int64_t count, Columns columns,
                 float* grad_h) const {
    multiply_dz(row, cell->first_state_sum, count, weight_hh, columns,
                [&](int64_t i, int64_t j, int64_t height, int64_t width, const float* sums) {
                  for (int64_t r = 0; r < height; ++r) {
                    write(sums + r * w, !cell->only_through_sums, grad_h + (i + r) * H + j, width);
                  }
                });
  }

  // Transposes dz and packs previous states and inputs into panels, as operands of the products for
  // weight gradients. The members split the rows in chunks of kGranule.
  void end_recurrence(int64_t count, const Part& part) const {
    if (!dz_transposed) return;
    for (int64_t first = part.member * kGranule; first < count; first += part.members * kGranule) {
      transpose_granule(first, count);
      pack_granule(first, count);
    }
  }

  void add_weight_gradient(const Blocks& blocks, bool initial, Share& share, int64_t zeros,
                           int64_t count, const Elements& panels, int64_t width,
                           float* grad) const {
    static_assert(kTaskRows % PairTile::rows == 0);
    PairTile tile;
    const int64_t start = max64(0, min64(zeros, count - 1)) / kGranule * kGranule;
    const Elements first_dz = dz_transposed + blocks.sum * dz_block * capacity;
    const int64_t M = blocks.count * dz_block;
    grad += blocks.block * dz_block * w;
    for (int64_t j = 0; j < width; j += w) {
      for (int64_t task = 0; task < M; task += kTaskRows) {
        if (!take(share)) continue;
        const int64_t end = min64(task + kTaskRows, M);
        for (int64_t k = start; k < padded(count); k += kPairChunkRows) {
          const int64_t K = min64(kPairChunkRows, padded(count) - k);
          for (int64_t i = task; i < end; i += PairTile::rows) {
            const PairOperands<kTerms> operands{first_dz + (i * capacity + k), capacity, K,
                                                panels + (j * capacity + k * w)};
            float* c = grad + j * cell->gates * dz_block + i * w;
            const int64_t height = min64(PairTile::rows, end - i);
            tile.multiply(&operands, 1, height, initial && k == start ? nullptr : c, c);
          }
        }
      }
    }
  }

  void write_weight_gradient(const Blocks& blocks, Share& share, int64_t zeros, int64_t count,
                             const Elements& panels, int64_t width, Storage* grad) const {
    PairTile tile;
    alignas(64) float sums[PairTile::rows * w];
    const int64_t start = max64(0, min64(zeros, count - 1)) / kGranule * kGranule;
    const int64_t K = padded(count) - start;
    const int64_t tiles = (H + PairTile::rows - 1) / PairTile::rows;  // number of tiles per block
    for (int64_t task = 0; task < blocks.count * tiles; ++task) {
      if (!take(share)) continue;
      const int64_t block = task / tiles;
      const int64_t i = task % tiles * PairTile::rows;
      const int64_t height = min64(PairTile::rows, H - i);
      const Elements a = dz_transposed + (((blocks.sum + block) * dz_block + i) * capacity + start);
      Storage* grad_rows = grad + ((blocks.block + block) * H + i) * width;
      for (int64_t j = 0; j < width; j += w) {
        const PairOperands<kTerms> operands{a, capacity, K, panels + (j * capacity + start * w)};
        tile.multiply(&operands, 1, height, nullptr, sums);
        for (int64_t r = 0; r < height; ++r) {
          convert(sums + r * w, grad_rows + r * width + j, min64(w, width - j));
        }
      }
    }
  }

  void write_input_gradient(const Backward<Storage>& args, const GroupRows& group,
                            const TimeBlock& block, Share& share, int64_t) const {
    const int64_t count = count_rows(group, block);
    for (int64_t first = 0; first < count; first += kTaskRows) {
      if (!take(share)) continue;
      multiply_dz(first, 0, min64(kTaskRows, count - first), weight_ih, Columns{0, D},
                  [&](int64_t i, int64_t j, int64_t height, int64_t width, const float* sums) {
                    for (int64_t r = 0; r < height; ++r) {
                      write(sums + r * w, args.accumulate_input, rows[first + i + r].grad_input + j,
                            width);
                    }
                  });
    }
  }

 private:
  // Multiplies `count` rows of dz, starting at `row`, by a weight in panels. Uses `gates` blocks of
  // each row, starting at block `first_sum`. Computes only `columns` of the product. Calls
  // finish(i, j, height, width, sums) for every tile [height, panel_width].
  template <class Finish>
  void multiply_dz(int64_t row, int64_t first_sum, int64_t count, const Elements& panels,
                   Columns columns, Finish&& finish) const {
    PairTile tile;
    alignas(64) float sums[PairTile::rows * w];
    const Elements a = dz + (row * dz_stride + first_sum * dz_block);
    const int64_t K = cell->gates * dz_block;
    for (int64_t j = columns.first; j < columns.last; j += w) {
      for (int64_t i = 0; i < count; i += PairTile::rows) {
        const int64_t height = min64(PairTile::rows, count - i);
        const PairOperands<kTerms> operands{a + i * dz_stride, dz_stride, K, panels + j * K};
        tile.multiply(&operands, 1, height, nullptr, sums);
        finish(i, j, height, min64(w, columns.last - j), sums);
      }
    }
  }

  // Writes `sums` to `result` [width], or adds them to `result` if `add`.
  template <class Result>
  static void write(const float* sums, bool add, Result* result, int64_t width) {
    if (!add) return convert(sums, result, width);
    for_each_vector<float>(width, [&](int64_t c, int64_t n) {
      store_upto(result + c, load_upto(result + c, n) + load(sums + c), n);
    });
  }

  // Writes columns first .. first + kGranule of dz_transposed. Treats rows of dz with an index of
  // at least `count` as zeros.
  void transpose_granule(int64_t first, int64_t count) const {
    constexpr int64_t lanes = Simd<float>::lanes;
    for (int t = 0; t < kTerms; ++t) {
      const auto dz_at = [&](int64_t row, int64_t i) {
        return row < count ? dz.term(t) + row * dz_stride + i : nullptr;
      };
      for (int64_t i = 0; i < cell->sums * dz_block; i += lanes) {
        Vec<float> square[lanes];
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          Vec<float> pairs[1];
          load_pairs(dz_at(first + 2 * r, i), dz_at(first + 2 * r + 1, i), lanes, pairs);
          square[r] = pairs[0];
        }
        transpose<float>(square);
        BFloat16* to = dz_transposed.term(t) + i * capacity + first;
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          std::memcpy(to + r * capacity, &square[r], sizeof(square[r]));
        }
      }
    }
  }

  // Packs rows first .. first + kGranule of the previous states and inputs into panels. Treats rows
  // with an index of at least `count` as zeros.
  void pack_granule(int64_t first, int64_t count) const {
    for (int64_t row = first; row < first + kGranule; row += 2) {
      constexpr PairRow<Storage> zero_row{};
      const PairRow<Storage>& a = row < count ? rows[row] : zero_row;
      const PairRow<Storage>& b = row + 1 < count ? rows[row + 1] : zero_row;
      for (int64_t j = 0; j < H; j += w) {
        pack_pair_row(a.previous, b.previous, H, j, previous + (j * capacity + row * w));
      }
      for (int64_t j = 0; j < D; j += w) {
        pack_pair_row(a.input, b.input, D, j, input + (j * capacity + row * w));
      }
    }
  }
};

}  // namespace
}  // namespace namernn_fast
