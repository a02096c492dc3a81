// Defines the tile interface for pairs of bfloat16, and packs the panels that the tiles read.
//
// A file in csrc/isa/ defines two names before it includes this header: the type `PairTile`, which
// computes one tile of a product, and `kKernelsInFloat`, the kernels that multiply in float.
#pragma once

#include <type_traits>

#include "kernel/products/terms.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

// PairTile::rows is the maximum number of rows of a tile. The arguments A, `start` and `c` of
// multiply() must point to memory for this many rows, even if `height` is less.
static_assert(std::is_same_v<decltype(PairTile::rows), const int64_t>);
// multiply(operands, count, height, start, c) writes start + A B to c [height, panel_width], summed
// over `count` pairs of operands A and B. `start` [height, panel_width] may equal c; null means
// zeros. The inner dimension K of each operand is a multiple of kGranule.
static_assert(
    std::is_same_v<decltype(&PairTile::multiply<1>),
                   void (PairTile::*)(const PairOperands<1>*, int, int64_t, const float*, float*)>);
// multiply_row() multiplies one row of A, and reads and writes only this row. It is faster than
// multiply() with a height of 1, but sums in a different order.
static_assert(
    std::is_same_v<decltype(&PairTile::multiply_row<1>),
                   void (PairTile::*)(const PairOperands<1>*, int, const float*, float*)>);

// Number of elements in one vector, and in one row of an AMX tile. Products pad their inner
// dimension K to a multiple of kGranule.
constexpr int64_t kGranule = 32;

// Returns n rounded up to a multiple of kGranule.
inline int64_t padded(int64_t n) { return (n + kGranule - 1) / kGranule * kGranule; }

// Allocates memory for the terms of n numbers.
template <int kTerms>
inline Terms<kTerms> scratch_terms(const Runtime& runtime, int64_t n) {
  return {scratch<BFloat16>(runtime, kTerms * n), n};
}

// Loads n adjacent numbers, starting at p, as pairs. `pairs` gets one vector for each term. Reads
// at most kGranule numbers. If n is less than kGranule, pads with zeros.
inline void load_adjacent(const BFloat16* p, int64_t n, Vec<float> (&pairs)[1]) {
  if (n >= kGranule) {
    std::memcpy(&pairs[0], p, sizeof(pairs[0]));
  } else {
    pairs[0] = Vec<float>{};
    std::memcpy(&pairs[0], p, n * sizeof(BFloat16));
  }
}
template <int kTerms>
inline void load_adjacent(const float* p, int64_t n, Vec<float> (&pairs)[kTerms]) {
  constexpr int64_t lanes = Simd<float>::lanes;
  static_assert(kGranule == 2 * lanes);
  const Vec<float> low = load_upto(p, min64(n, lanes));
  const Vec<float> high = n > lanes ? load_upto(p + lanes, min64(n - lanes, lanes)) : Vec<float>{};
  pairs[0] = rounded_numbers(low, high);
  if constexpr (kTerms == 2) pairs[1] = rounded_numbers(rest_of(low), rest_of(high));
}

// Loads n pairs (a[i], b[i]), one vector for each term. A null pointer stands for a row of zeros.
template <int kTerms, class Storage>
inline void load_pairs(const Storage* a, const Storage* b, int64_t n, Vec<float> (&pairs)[kTerms]) {
  Word low[kTerms] = {}, high[kTerms] = {};
  if (a) load_terms(a, n, low);
  if (b) load_terms(b, n, high);
  for (int t = 0; t < kTerms; ++t) pairs[t] = (Vec<float>)(low[t] | high[t] << 16);
}

// Stores pairs, one vector for each term.
template <int kTerms>
inline void store_pairs(const Terms<kTerms>& to, const Vec<float> (&pairs)[kTerms]) {
  for (int t = 0; t < kTerms; ++t) std::memcpy(to.term(t), &pairs[t], sizeof(pairs[t]));
}

// Packs the panel of W^T that starts at column `first`, from a row-major W [width, K]. The panel's
// shape is [padded(K) / 2, panel_width, 2]; a pair holds two consecutive rows.
template <int kTerms, class Storage>
inline void pack_pairs(const Storage* w, int64_t K, int64_t width, int64_t first,
                       const Terms<kTerms>& panel) {
  constexpr int64_t lanes = Simd<float>::lanes;
  constexpr int64_t panel_width = Shape<float>::panel_width;
  for (int64_t j = 0; j < panel_width; j += lanes) {
    const int64_t rows = min64(lanes, width - (first + j));
    for (int64_t k = 0; k < padded(K); k += kGranule) {
      Vec<float> squares[kTerms][lanes] = {};  // each lane holds one pair
      const Storage* source = w + (first + j) * K + k;
      const auto load_row = [&](int64_t r, int64_t n) {
        Vec<float> pairs[kTerms];
        load_adjacent(source + r * K, n, pairs);
        for (int t = 0; t < kTerms; ++t) squares[t][r] = pairs[t];
      };
      if (rows == lanes && k + kGranule <= K) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) load_row(r, kGranule);
      } else {
        for (int64_t r = 0; r < rows; ++r) load_row(r, min64(kGranule, K - k));
      }
      for (int t = 0; t < kTerms; ++t) {
        transpose<float>(squares[t]);
        BFloat16* to = panel.term(t) + (k / 2 * panel_width + j) * 2;
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r) {
          std::memcpy(to + r * panel_width * 2, &squares[t][r], sizeof(squares[t][r]));
        }
      }
    }
  }
}

// Packs one row of a panel of pairs: the elements of rows a and b [width], starting at column
// `first`, padded with zeros. A null row stands for zeros.
template <int kTerms, class Storage>
inline void pack_pair_row(const Storage* a, const Storage* b, int64_t width, int64_t first,
                          const Terms<kTerms>& panel_row) {
  constexpr int64_t lanes = Simd<float>::lanes;
  for (int64_t j = 0; j < Shape<float>::panel_width; j += lanes) {
    const int64_t n = min64(lanes, width - (first + j));
    Vec<float> pairs[kTerms] = {};
    if (n > 0) load_pairs(a ? a + first + j : nullptr, b ? b + first + j : nullptr, n, pairs);
    store_pairs(panel_row + 2 * j, pairs);
  }
}

// Packs the panel of W that starts at column `first`, from a row-major W [K, width]. The panel's
// shape is [padded(K) / 2, panel_width, 2].
template <int kTerms, class Storage>
inline void pack_pair_rows(const Storage* w, int64_t K, int64_t width, int64_t first,
                           const Terms<kTerms>& panel) {
  for (int64_t k = 0; k < padded(K); k += 2) {
    pack_pair_row(k < K ? w + k * width : nullptr, k + 1 < K ? w + (k + 1) * width : nullptr, width,
                  first, panel + k * Shape<float>::panel_width);
  }
}

// Holds a layer's weights in the format that the forward pass on pairs reads. The memory holds all
// unit blocks, or a single one that is repacked for each unit block in turn.
template <class Storage, int kTerms>
struct PairPanels {
  static constexpr int64_t w = Shape<float>::panel_width;

  int64_t blocks;  // number of unit blocks that the memory holds
  // [blocks, sums] panels: W_ih^T above W_hh^T, or only the weight that contributes to the sum.
  Terms<kTerms> weights;
  float* bias;  // [blocks, sums, panel_width], see pack_bias()
  Own<float> own;

  // Returns the number of unit blocks in a layer.
  static int64_t count(const Layer<Storage>& layer) { return panel_count<float>(layer.H); }
  // Returns the number of elements in a unit block.
  static int64_t unit_block_size(const Layer<Storage>& layer) {
    return layer.cell->gates * (padded(layer.D) + padded(layer.H)) * w;
  }
  static size_t block_bytes(const Layer<Storage>& layer) {
    return kTerms * unit_block_size(layer) * sizeof(BFloat16) +
           (layer.cell->sums + own_blocks(*layer.cell)) * w * sizeof(float);
  }
  static size_t bytes(const Layer<Storage>& layer) { return count(layer) * block_bytes(layer); }
  PairPanels(void* memory, const Layer<Storage>& layer, int64_t blocks)
      : blocks(blocks),
        weights{static_cast<BFloat16*>(memory), blocks * unit_block_size(layer)},
        bias(reinterpret_cast<float*>(weights.term(kTerms))),
        own{bias + blocks * layer.cell->sums * w, blocks * w} {}
  PairPanels(void* memory, const Layer<Storage>& layer) : PairPanels(memory, layer, count(layer)) {}

  // Returns the biases of unit block p.
  float* bias_of(const Cell& cell, int64_t p) const { return bias + p % blocks * cell.sums * w; }
  // Returns the index of unit block p's first unit in `own`.
  int64_t own_unit(int64_t p) const { return p % blocks * w; }

  // Calls f(s, input_panel, state_panel) for each sum s of unit block p. `input_panel` points
  // to the first row of W_ih in the sum's panel, and `state_panel` to the first row of W_hh. Either
  // is null if its weight does not contribute to the sum.
  template <class F>
  void for_each_panel(const Layer<Storage>& layer, int64_t p, F&& f) const {
    const Cell& cell = *layer.cell;
    Terms<kTerms> panel = weights + p % blocks * unit_block_size(layer);
    for (int64_t s = 0; s < cell.sums; ++s) {
      Terms<kTerms> of_input{}, of_state{};
      if (s < cell.gates) of_input = panel, panel = panel + padded(layer.D) * w;
      if (s >= cell.first_state_sum) of_state = panel, panel = panel + padded(layer.H) * w;
      f(s, of_input, of_state);
    }
  }

  void pack(const Layer<Storage>& layer, int64_t p) const {
    const Cell& cell = *layer.cell;
    const int64_t D = layer.D;
    const int64_t H = layer.H;
    if constexpr (std::is_same_v<Storage, float>) {
      if (layer.panels) return convert_block(layer, p);
    }
    for_each_panel(layer, p, [&](int64_t s, Terms<kTerms> of_input, Terms<kTerms> of_state) {
      if (of_input) {
        const Storage* block = block_of(layer.parameters[kWeightIh], cell.input_block[s], H, D);
        pack_pairs(block, D, H, p * w, of_input);
      }
      if (of_state) {
        const int64_t g = s - cell.first_state_sum;
        pack_pairs(block_of(layer.parameters[kWeightHh], g, H, H), H, H, p * w, of_state);
      }
    });
    pack_bias(layer, p, bias_of(cell, p));
    pack_own(layer, p, own, own_unit(p));
  }

  // Packs unit block p from the layer's panels, which hold floats.
  void convert_block(const Layer<float>& layer, int64_t p) const {
    const Cell& cell = *layer.cell;
    const int64_t D = layer.D;
    const int64_t H = layer.H;
    const ForwardPanels<float> from(const_cast<void*>(layer.panels), layer);
    const float* block = from.weights + p * from.unit_block_size(layer);
    for_each_panel(layer, p, [&](int64_t s, Terms<kTerms> of_input, Terms<kTerms> of_state) {
      if (of_input) pack_pair_rows(block + s * (D + H) * w, D, w, 0, of_input);
      if (of_state) {
        const float* rows = block + ((s - cell.first_state_sum) * (D + H) + D) * w;
        pack_pair_rows(rows, H, w, 0, of_state);
      }
    });
    convert(from.bias + p * cell.sums * w, bias_of(cell, p), cell.sums * w);
    for (int64_t i = 0; i < own_blocks(cell); ++i) {
      convert(from.own.at(i, p * w), own.at(i, own_unit(p)), w);
    }
  }

  // Copies the weights of unit block p back to row-major weights.
  void unpack(const Layer<Storage>& layer, int64_t p, Storage* const (&to)[kParameters]) const {
    static_assert(std::is_same_v<Storage, BFloat16> && kTerms == 1);
    const int64_t D = layer.D, H = layer.H;
    const auto from = [](const Terms<kTerms>& panel) {
      return [=](int64_t k, int64_t j) { return panel.first[(k / 2 * w + j) * 2 + k % 2]; };
    };
    for_each_panel(layer, p, [&](int64_t s, Terms<kTerms> of_input, Terms<kTerms> of_state) {
      if (of_input) {
        Storage* block = to[kWeightIh] + layer.cell->input_block[s] * H * D;
        unpack_panel(D, H, p * w, w, block, from(of_input));
      }
      if (of_state) {
        Storage* block = to[kWeightHh] + (s - layer.cell->first_state_sum) * H * H;
        unpack_panel(H, H, p * w, w, block, from(of_state));
      }
    });
  }
};

// Encodes rows as terms for forward_encoded(). Uses bfloat16 rows unchanged, and rounds float rows
// to one or two terms.
template <int kTerms>
struct AsTerms {
  using Tile = PairTile;
  using Operands = PairOperands<kTerms>;
  using Row = Terms<kTerms>;
  using State = Terms<kTerms>;
  template <class Storage>
  using Panels = PairPanels<Storage, kTerms>;
  static constexpr size_t weight_bytes = kTerms * sizeof(BFloat16);
  static constexpr double speed = sizeof(float) / double(weight_bytes);

  static int64_t input_size(int64_t n) { return padded(n); }
  static int64_t row_size(int64_t n) { return padded(n); }
  static int64_t state_size(int64_t n) { return padded(n); }
  template <class Storage>
  static void encode(const Storage* from, const Terms<kTerms>& to, int64_t n) {
    convert(from, to, n);
  }
  static Operands operands_of_inputs(const Row& row, int64_t n, const Row& panel) {
    return {row, padded(n), padded(n), panel};
  }
  static Operands operands_of_states(const Row& row, int64_t n, const Row& panel) {
    return {row, padded(n), padded(n), panel};
  }
  static Terms<kTerms> scratch_rows(const Runtime& runtime, int64_t rows, int64_t n, int64_t size) {
    const Terms<kTerms> terms = scratch_terms<kTerms>(runtime, rows * size);
    if (size > n) fill_zeros(terms, rows * size);
    return terms;
  }
};

}  // namespace
}  // namespace namernn_fast
