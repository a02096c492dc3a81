// The forward pass in bfloat16 on instructions that multiply pairs of bfloat16 and sum in float.
//
// A row of the left operand is [x_t, h_{t-1}], each of the two padded with zeros to a multiple of
// kGranule elements, so that projection and recurrence are one product. Two arrays of such rows
// alternate: while one is read, the new states are written to the other, rounded as in the output.
// A file in csrc/isa/ defines the product of one tile, as the type `PairTile`, before it includes
// this file.
#pragma once

#include <type_traits>

#include "kernel/forward_copied.h"
#include "kernel/weights.h"

namespace namernn_fast {
namespace {

// PairTile::rows is the maximum number of rows of a tile. `a` and `c` have memory for this many,
// even if `height` is less.
static_assert(std::is_same_v<decltype(PairTile::rows), const int64_t>);
// multiply<kAdd>(a, a_row, K, height, panel, c): c[height, panel_width] = a[height, K] panel, or +=
// if kAdd. K is a multiple of kGranule.
static_assert(std::is_same_v<decltype(&PairTile::multiply<true>),
                             void (PairTile::*)(const BFloat16*, int64_t, int64_t, int64_t,
                                                const BFloat16*, float*)>);

constexpr int64_t kGranule =
    32;  // K is padded to a multiple of this, which any such instruction can read

// Returns n, rounded up to whole granules.
inline int64_t padded(int64_t n) { return (n + kGranule - 1) / kGranule * kGranule; }

// Packs one panel of W^T, columns `first` and up, from a row-major W [width, K]. The panel is
// [padded(K) / 2, panel_width, 2]: the elements of a pair are adjacent in K.
inline void pack_pairs(const BFloat16* w, int64_t K, int64_t width, int64_t first,
                       BFloat16* panel) {
  constexpr int64_t lanes = Simd<float>::lanes;
  constexpr int64_t panel_width = Shape<float>::panel_width;
  static_assert(kGranule == 2 * lanes);
  for (int64_t j = 0; j < panel_width; j += lanes) {
    const int64_t rows = min64(lanes, width - (first + j));
    for (int64_t k = 0; k < padded(K); k += kGranule) {
      Vec<float> square[lanes] = {};  // each lane is a pair
      const BFloat16* source = w + (first + j) * K + k;
      if (rows == lanes && k + kGranule <= K) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < lanes; ++r)
          std::memcpy(&square[r], source + r * K, sizeof(square[r]));
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          std::memcpy(&square[r], source + r * K, min64(kGranule, K - k) * sizeof(BFloat16));
        }
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes; ++r) {
        std::memcpy(panel + ((k / 2 + r) * panel_width + j) * 2, &square[r], sizeof(square[r]));
      }
    }
  }
}

// A layer's weights as the forward pass on pairs reads them.
template <class Cell>
struct PairPanels {
  static constexpr int64_t w = Shape<float>::panel_width;

  BFloat16* weights;  // [unit blocks, weight blocks] panels of [padded(D) + padded(H), H]
  float* bias;        // [unit blocks, weight blocks, panel_width]

  static int64_t count(int64_t, int64_t H) { return panel_count<float>(H); }  // unit blocks
  static int64_t panel_size(int64_t D, int64_t H) { return (padded(D) + padded(H)) * w; }
  static size_t bytes(int64_t D, int64_t H) {
    return count(D, H) * Cell::weight_blocks *
           (panel_size(D, H) * sizeof(BFloat16) + w * sizeof(float));
  }
  PairPanels(void* memory, int64_t D, int64_t H)
      : weights(static_cast<BFloat16*>(memory)),
        bias(reinterpret_cast<float*>(weights +
                                      count(D, H) * Cell::weight_blocks * panel_size(D, H))) {}

  void pack(const Layer<BFloat16>& layer, int64_t p) const {
    const int64_t D = layer.D;
    const int64_t H = layer.H;
    for (int64_t g = 0; g < Cell::weight_blocks; ++g) {
      BFloat16* panel = weights + (p * Cell::weight_blocks + g) * panel_size(D, H);
      pack_pairs(block_of(layer.weight_ih, g, H, D), D, H, p * w, panel);
      pack_pairs(block_of(layer.weight_hh, g, H, H), H, H, p * w, panel + padded(D) * w);
    }
    pack_bias<Cell>(layer, p, bias + p * Cell::weight_blocks * w);
  }
};

// Fills in the rows of step s: inputs, and states of sequences that start there. The step before
// wrote all other states.
inline void prepare_pairs(const Layer<BFloat16>& layer, int64_t s, const Part& part,
                          BFloat16* rows) {
  const int64_t t = time_of(layer, s);
  const int64_t K = padded(layer.D) + padded(layer.H);
  const int64_t continued = continued_end(layer, t, part.slice);
  const int64_t end = alive_end(layer.layout, t, part.slice);
  for (int64_t b = part.slice.begin + part.member; b < end; b += part.members) {
    BFloat16* row = rows + (b - part.slice.begin) * K;
    if (layer.D > 0) std::memcpy(row, input_row(layer, t, b), layer.D * sizeof(BFloat16));
    if (b < continued) continue;
    BFloat16* state = row + padded(layer.D);
    if (layer.hx && !is_cut(layer, t, b)) {
      std::memcpy(state, initial_state(layer, b), layer.H * sizeof(BFloat16));
    } else {
      std::memset(state, 0, layer.H * sizeof(BFloat16));
    }
  }
}

// The forward pass of one part. `arrays` are the two arrays of rows of all groups, each
// [B + groups * PairTile::rows, padded(D) + padded(H)].
template <class Cell>
inline void forward_pairs_part(const Forward<BFloat16>& args, const PairPanels<Cell>& panels,
                               BFloat16* const (&arrays)[2], const Part& part,
                               const Runtime& runtime) {
  static_assert(Cell::sums == 1 && Cell::kept == 0, "states are computed from a tile's sums alone");
  constexpr int64_t w = Shape<float>::panel_width;
  const Layer<BFloat16>& layer = args.layer;
  const Cell cell(layer);
  const SequenceLayout& layout = layer.layout;
  const Slice slice = part.slice;
  const Columns columns = part.columns;
  const int64_t K = padded(layer.D) + padded(layer.H);
  const int64_t offset = (slice.begin + part.group * PairTile::rows) * K;
  BFloat16* const rows[2] = {arrays[0] + offset, arrays[1] + offset};
  PairTile tile;
  alignas(64) float sums[PairTile::rows * w];

  prepare_pairs(layer, 0, part, rows[0]);
  if (part.team) barrier(*part.team, runtime);
  for (int64_t s = 0; s < layout.T; ++s) {
    const int64_t t = time_of(layer, s);
    const BFloat16* now = rows[s % 2];
    BFloat16* next = rows[(s + 1) % 2];
    if (s + 1 < layout.T) prepare_pairs(layer, s + 1, part, next);
    const int64_t end = alive_end(layout, t, slice);
    const int64_t ended = alive_end(layout, time_after(layer, t), slice);  // first that ends at t
    for (int64_t j = columns.first; j < columns.last; j += w) {
      const BFloat16* panel = panels.weights + j / w * K * w;
      const int64_t width = min64(w, columns.last - j);
      for (int64_t i = slice.begin; i < end; i += PairTile::rows) {
        const int64_t height = min64(PairTile::rows, end - i);
        tile.multiply<false>(now + (i - slice.begin) * K, K, K, height, panel, sums);
        for (int64_t b = i; b < i + height; ++b) {
          const float* z = sums + (b - i) * w;
          BFloat16* out = args.output.data ? row_at(args.output, layout, t, b) + j : nullptr;
          const BFloat16* looked_up = has_table(layer) ? table_row(layer, t, b) + j : nullptr;
          BFloat16* state = b < ended ? next + (b - slice.begin) * K + padded(layer.D) + j
                                      : args.h_n + place_of(layout, b) * layer.H + j;
          const bool cut = b < ended && is_cut(layer, time_after(layer, t), b);
          for_each_vector<float>(width, [&](int64_t c, int64_t n) {
            Vec<float> sum = load(z + c) + load(panels.bias + j + c);
            if (looked_up) sum += load_upto(looked_up + c, n);
            const Vec<float> h = cell.template state<float>(sum);
            if (out) store_upto(out + c, h, n);
            store_upto(state + c, cut ? Vec<float>{} : h, n);
          });
        }
      }
    }
    if (part.team && s + 1 < layout.T) barrier(*part.team, runtime);
  }
}

template <class Cell>
void forward_pairs(const Forward<BFloat16>& args, const Runtime& runtime) {
  const Layer<BFloat16>& layer = args.layer;
  if (layer.in_place.weight_hh && (has_table(layer) || layer.in_place.weight_ih)) {
    return forward_copied<Cell>(args, runtime);  // in float, because pair instructions need panels
  }
  const Plan plan =
      choose_plan({layer.layout, runtime.machine, layer.D, layer.H, panel_count<float>(layer.H),
                   sizeof(BFloat16), Cell::weight_blocks});
  Team* teams = scratch<Team>(runtime, plan.groups);
  const WeightCopies copies = weight_copies<PairPanels<Cell>>(layer, plan, runtime);
  const int64_t elements =
      (layer.layout.B + plan.groups * PairTile::rows) * (padded(layer.D) + padded(layer.H));
  BFloat16* arrays[2];
  for (BFloat16*& rows : arrays) {
    rows = scratch<BFloat16>(runtime, elements);
    std::memset(rows, 0, elements * sizeof(BFloat16));
  }
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const auto panels = weights_for<PairPanels<Cell>>(part, layer, copies);
    forward_pairs_part(args, panels, arrays, part, runtime);
  });
}

}  // namespace
}  // namespace namernn_fast
