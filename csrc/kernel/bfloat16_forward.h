// Runs the forward pass in bfloat16 with instructions that multiply pairs of bfloat16 and sum in
// float.
//
// A row of the left operand is [x_t, h_{t-1}], so that projection and recurrence are one product.
// Both x_t and h_{t-1} are padded with zeros to a multiple of kGranule elements. Two arrays of such
// rows alternate: each step reads one array and writes the new states to the other array, rounded
// to bfloat16 like the output. A state that the next step reads without a product stays in float:
// the cell state, or h if the cell is not only_through_sums. A file in csrc/isa/ defines two names
// before it includes this header: the type `PairTile`, which computes one tile of a product, and
// `kKernelsInFloat`, the kernels that convert bfloat16 to float.
#pragma once

#include <type_traits>

#include "kernel/cells/cell.h"
#include "kernel/weights.h"

namespace namernn_fast {
namespace {

// PairTile::rows is the maximum number of rows of a tile. The arguments `a` and `c` of multiply()
// must point to memory for this many rows, even if `height` is less.
static_assert(std::is_same_v<decltype(PairTile::rows), const int64_t>);
// multiply<kAdd>(a, a_row, K, height, panel, c) writes the product of a [height, K] and the panel
// to c [height, panel_width], or adds the product to c if kAdd. a_row is the row stride of a, and K
// is a multiple of kGranule.
static_assert(std::is_same_v<decltype(&PairTile::multiply<true>),
                             void (PairTile::*)(const BFloat16*, int64_t, int64_t, int64_t,
                                                const BFloat16*, float*)>);

// K is padded to a multiple of this number of elements, which fill one vector or one row of an AMX
// tile.
constexpr int64_t kGranule = 32;

// Returns n rounded up to a multiple of kGranule.
inline int64_t padded(int64_t n) { return (n + kGranule - 1) / kGranule * kGranule; }

// Packs the panel of W^T that starts at column `first`, from a row-major W [width, K]. The panel's
// shape is [padded(K) / 2, panel_width, 2]; the two elements of a pair are adjacent in K.
inline void pack_pairs(const BFloat16* w, int64_t K, int64_t width, int64_t first,
                       BFloat16* panel) {
  constexpr int64_t lanes = Simd<float>::lanes;
  constexpr int64_t panel_width = Shape<float>::panel_width;
  static_assert(kGranule == 2 * lanes);
  for (int64_t j = 0; j < panel_width; j += lanes) {
    const int64_t rows = min64(lanes, width - (first + j));
    for (int64_t k = 0; k < padded(K); k += kGranule) {
      Vec<float> square[lanes] = {};  // each lane holds one pair
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

// Holds a layer's weights in the format that the forward pass on pairs reads.
template <class Cell>
struct PairPanels {
  static constexpr int64_t w = Shape<float>::panel_width;

  BFloat16* weights;  // [unit blocks], each with one panel per sum. The panel holds W_ih^T above
                      // W_hh^T, or only the weight that contributes to the sum
  float* bias;        // [unit blocks, sums, panel_width], see pack_bias()

  // Returns the number of unit blocks.
  static int64_t count(int64_t, int64_t H) { return panel_count<float>(H); }
  // Returns the number of elements from one unit block to the next.
  static int64_t unit_block_size(int64_t D, int64_t H) {
    return Cell::weight_blocks * (padded(D) + padded(H)) * w;
  }
  static size_t bytes(int64_t D, int64_t H) {
    return count(D, H) *
           (unit_block_size(D, H) * sizeof(BFloat16) + Cell::sums * w * sizeof(float));
  }
  PairPanels(void* memory, int64_t D, int64_t H)
      : weights(static_cast<BFloat16*>(memory)),
        bias(reinterpret_cast<float*>(weights + count(D, H) * unit_block_size(D, H))) {}

  void pack(const Layer<BFloat16>& layer, int64_t p) const {
    const int64_t D = layer.D;
    const int64_t H = layer.H;
    BFloat16* panel = weights + p * unit_block_size(D, H);
    for (int64_t s = 0; s < Cell::sums; ++s) {
      if (s < Cell::weight_blocks) {
        pack_pairs(block_of(layer.weight_ih, Cell::input_block(s), H, D), D, H, p * w, panel);
        panel += padded(D) * w;
      }
      if (s >= Cell::first_state_sum) {
        pack_pairs(block_of(layer.weight_hh, s - Cell::first_state_sum, H, H), H, H, p * w, panel);
        panel += padded(H) * w;
      }
    }
    pack_bias<Cell>(layer, p, bias + p * Cell::sums * w);
  }
};

// Fills in the member's share of the rows of step s: the inputs, and the states of sequences that
// start at this step. The previous step writes the states of all other sequences.
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
    if (layer.initial[0].data && !is_cut(layer, t, b)) {
      std::memcpy(state, initial_state(layer, 0, b), layer.H * sizeof(BFloat16));
    } else {
      std::memset(state, 0, layer.H * sizeof(BFloat16));
    }
  }
}

// Runs the forward pass of one part.
template <class Cell>
struct PairPart {
  static constexpr int64_t w = Shape<float>::panel_width;
  static constexpr int64_t kBlock = PairTile::rows * w;  // elements in the tile of one sum

  const Forward<BFloat16>& args;
  const PairPanels<Cell>& panels;
  const Part& part;
  // Each array holds the slice's rows [.., padded(D) + padded(H)]. Step s reads arrays[s % 2].
  BFloat16* arrays[2];
  float* carried;  // [B, state_size(H)], the state that a step reads without a product; null if
                   // there is none

  // A step reads at most one state without a product.
  static_assert(Cell::states == 1 || Cell::only_through_sums);
  // The index of the state that a step reads without a product, which is always the cell's last
  // state; -1 if there is no such state.
  static constexpr int carried_state =
      Cell::states == 1 && Cell::only_through_sums ? -1 : Cell::states - 1;
  // Returns the number of elements in a row of `carried`, which consists of whole vectors.
  static int64_t state_size(int64_t H) { return panel_count<float>(H) * w; }
  int64_t row_size() const { return padded(args.layer.D) + padded(args.layer.H); }

  // Computes the sums of `height` rows for the unit block that starts at unit j.
  void multiply(PairTile& tile, const BFloat16* rows, int64_t height, int64_t j,
                float* sums) const {
    const int64_t D = padded(args.layer.D);
    const int64_t K = row_size();
    const BFloat16* panel =
        panels.weights + j / w * PairPanels<Cell>::unit_block_size(args.layer.D, args.layer.H);
    for (int64_t s = 0; s < Cell::sums; ++s) {
      const int64_t begin = s < Cell::weight_blocks ? 0 : D;
      const int64_t end = s < Cell::first_state_sum ? D : K;
      tile.multiply<false>(rows + begin, K, end - begin, height, panel, sums + s * kBlock);
      panel += (end - begin) * w;
    }
  }

  // Adds the biases and, if the layer has a table, the table's row for (t, b) to the sums of units
  // j .. j + width.
  void add_starts(int64_t t, int64_t b, int64_t j, int64_t width, float* sums) const {
    const Layer<BFloat16>& layer = args.layer;
    const BFloat16* looked_up =
        has_table(layer) ? table_row(layer, t, b, Cell::weight_blocks * layer.H) + j : nullptr;
    const float* bias = panels.bias + j * Cell::sums;
    for (int64_t s = 0; s < Cell::sums; ++s, bias += w, sums += kBlock) {
      const BFloat16* row = looked_up && s < Cell::weight_blocks
                                ? looked_up + Cell::input_block(s) * layer.H
                                : nullptr;
      for_each_vector<float>(width, [&](int64_t c, int64_t n) {
        Vec<float> sum = load(sums + c) + load(bias + c);
        if (row) sum += load_upto(row + c, n);
        store(sums + c, sum);
      });
    }
  }

  struct Step {
    int64_t t;
    int64_t continued_end;  // sequences below this index continue from the previous step
    int64_t continues_end;  // sequences below this index continue at the next step
    const BFloat16* now;    // rows that the step reads
    BFloat16* next;         // rows that the next step reads
  };

  // Turns the sums of units j .. j + width of sequence b into states, and writes h to the output.
  // If the sequence continues, also writes h to the sequence's row for the next step; otherwise
  // writes all states to `last`.
  void finish(const Step& step, int64_t b, int64_t j, int64_t width, float* sums) const {
    const Layer<BFloat16>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const int64_t H = layer.H;
    const int64_t t = step.t;
    const int64_t state_at = (b - part.slice.begin) * row_size() + padded(layer.D) + j;
    add_starts(t, b, j, width, sums);
    StateRow<float, BFloat16> row{sums, kBlock, {}, {sums}, nullptr, H, width};
    if (args.kept.data) row.kept = row_at(args.kept, layout, t, b) + j;
    if constexpr (carried_state >= 0) {
      float* state = carried + b * state_size(H) + j;
      const bool cut = is_cut(layer, t, b);
      const bool starts = b >= step.continued_end || cut;
      const BFloat16* initial = starts && !cut ? initial_state(layer, carried_state, b) : nullptr;
      if (initial) convert(initial + j, state, width);
      row.previous[carried_state] = starts && !initial ? nullptr : state;
      row.states[carried_state] = state;
    }
    Cell(layer).states_of(row);
    for (int i = 1; i < Cell::states && b >= step.continues_end; ++i) {
      convert(row.states[i], args.last[i] + place_of(layout, b) * H + j, width);
    }
    const float* h = row.states[0];
    // Always loads whole vectors, which is faster if the vectors have just been written.
    const auto write = [h, width](BFloat16* to) {
      for_each_vector<float>(width,
                             [=](int64_t c, int64_t n) { store_upto(to + c, load(h + c), n); });
    };
    if (args.output.data) write(row_at(args.output, layout, t, b) + j);
    if (b >= step.continues_end) {
      write(args.last[0] + place_of(layout, b) * H + j);
    } else if (is_cut(layer, time_after(layer, t), b)) {
      std::memset(step.next + state_at, 0, width * sizeof(BFloat16));
    } else {
      write(step.next + state_at);
    }
  }

  void run(const Runtime& runtime) const {
    const Layer<BFloat16>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const Slice slice = part.slice;
    const Columns columns = part.columns;
    const int64_t K = row_size();
    PairTile tile;
    alignas(64) float sums[Cell::sums * kBlock];

    prepare_pairs(layer, 0, part, arrays[0]);
    if (part.team) barrier(*part.team, runtime);
    for (int64_t s = 0; s < layout.T; ++s) {
      const int64_t t = time_of(layer, s);
      const Step step{t, continued_end(layer, t, slice),
                      alive_end(layout, time_after(layer, t), slice), arrays[s % 2],
                      arrays[(s + 1) % 2]};
      if (s + 1 < layout.T) prepare_pairs(layer, s + 1, part, step.next);
      const int64_t end = alive_end(layout, t, slice);
      for (int64_t j = columns.first; j < columns.last; j += w) {
        const int64_t width = min64(w, columns.last - j);
        for (int64_t i = slice.begin; i < end; i += PairTile::rows) {
          const int64_t height = min64(PairTile::rows, end - i);
          multiply(tile, step.now + (i - slice.begin) * K, height, j, sums);
          for (int64_t r = 0; r < height; ++r) finish(step, i + r, j, width, sums + r * w);
        }
      }
      if (part.team && s + 1 < layout.T) barrier(*part.team, runtime);
    }
  }
};

template <class Cell>
void forward_pairs(const Forward<BFloat16>& args, const Runtime& runtime) {
  const Layer<BFloat16>& layer = args.layer;
  if (layer.in_place.weight_hh && (has_table(layer) || layer.in_place.weight_ih)) {
    // The instructions for pairs need weights in panels, so the float kernels run this call.
    const KernelsFor<BFloat16>& in_float = kKernelsInFloat.cells[size_t(Cell::kind)];
    return in_float.forward(args, runtime);
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
  float* carried = nullptr;
  if (PairPart<Cell>::carried_state >= 0) {
    carried = scratch<float>(runtime, layer.layout.B * PairPart<Cell>::state_size(layer.H));
  }
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const auto panels = weights_for<PairPanels<Cell>>(part, layer, copies);
    const int64_t first =
        (part.slice.begin + part.group * PairTile::rows) * (padded(layer.D) + padded(layer.H));
    PairPart<Cell>{args, panels, part, {arrays[0] + first, arrays[1] + first}, carried}.run(
        runtime);
  });
}

}  // namespace
}  // namespace namernn_fast
