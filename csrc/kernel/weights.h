// Stores a layer's weights in panels: defines the formats, packs the weights, and decides where
// each group reads them.
#pragma once

#include <type_traits>

#include "kernel/panels.h"
#include "kernel/sharing.h"

namespace namernn_fast {
namespace {

// Panels of a cell's weights are ordered by unit block. Unit block p, for the hidden units
// p * panel_width .. (p + 1) * panel_width, has one panel for each of the cell's weight blocks.

// Returns block number `block` of a weight or bias that has H * row elements per block. Returns
// null if `weights` is null.
template <class Storage>
inline const Storage* block_of(const Storage* weights, int64_t block, int64_t H, int64_t row) {
  return weights ? weights + block * H * row : nullptr;
}

// A range of `count` blocks of a weight, starting at `block`, and the range of sums to which these
// blocks contribute, starting at `sum`.
struct Blocks {
  int64_t sum;
  int64_t count;
  int64_t block;
};

// All blocks of weight_hh.
template <class Cell>
constexpr Blocks kStateBlocks = {Cell::first_state_sum, Cell::weight_blocks, 0};

// Calls f(blocks) for ranges that together cover all blocks of weight_ih, in the order of their
// sums. Uses as few ranges as possible.
template <class Cell, class F>
inline void for_each_input_blocks(F&& f) {
  for (Blocks blocks{}; blocks.sum < Cell::weight_blocks; blocks.sum += blocks.count) {
    const int64_t sum = blocks.sum;
    blocks.block = Cell::input_block(sum);
    blocks.count = 1;
    while (sum + blocks.count < Cell::weight_blocks &&
           Cell::input_block(sum + blocks.count) == blocks.block + blocks.count) {
      ++blocks.count;
    }
    f(blocks);
  }
}

// Writes the contribution of the biases to each sum of unit block p into `bias`: panel_width
// elements per sum.
template <class Cell, class Storage, class Scalar>
inline void pack_bias(const Layer<Storage>& layer, int64_t p, Scalar* bias) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  alignas(64) Scalar other[w];
  for (int64_t s = 0; s < Cell::sums; ++s, bias += w) {
    const bool from_input = s < Cell::weight_blocks;
    const bool from_state = s >= Cell::first_state_sum;
    pack_row(from_input ? block_of(layer.bias_ih, Cell::input_block(s), layer.H, 1) : nullptr,
             layer.H, p * w, bias);
    pack_row(from_state ? block_of(layer.bias_hh, s - Cell::first_state_sum, layer.H, 1) : nullptr,
             layer.H, p * w, other);
    for (int64_t j = 0; j < w; ++j) bias[j] += other[j];
  }
}

// Copies a block of a weight from a panel back to a row-major weight: columns first .. first +
// panel_width of the weight's transpose [K, width]. `element(k, j)` returns an element of the
// panel.
template <class Storage, class Element>
inline void unpack_panel(int64_t K, int64_t width, int64_t first, int64_t panel_width, Storage* to,
                         Element&& element) {
  for (int64_t j = 0; j < min64(panel_width, width - first); ++j) {
    for (int64_t k = 0; k < K; ++k) to[(first + j) * K + k] = element(k, j);
  }
}

// Holds a layer's weights in the format that the forward pass reads, in one allocation. The weights
// are stored in the type that products compute in or, if Element is Storage, as the tensors store
// them.
template <class Cell, class Storage, class Element = Compute<Storage>>
struct ForwardPanels {
  using Scalar = Compute<Storage>;
  using Prepared = ForwardPanels<Cell, Storage, Storage>;  // the format of Layer::panels
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Element* weights;  // [unit blocks, weight blocks] panels of [D + H, H]: W_ih^T above W_hh^T.
                     // Panel g of a unit block holds block input_block(g) of weight_ih and block g
                     // of weight_hh
  Scalar* bias;      // [unit blocks, sums, panel_width], see pack_bias()
  bool* finite;      // [unit blocks], whether weight_hh is known to be finite, so that a zero state
                     // needs no product

  // Returns the number of unit blocks.
  static int64_t count(int64_t, int64_t H) { return panel_count<Scalar>(H); }
  // Returns the number of elements from one unit block to the next.
  static int64_t unit_block_size(int64_t D, int64_t H) { return Cell::weight_blocks * (D + H) * w; }
  static size_t bytes(int64_t D, int64_t H) {
    const int64_t bias_size = Cell::sums * w;
    return count(D, H) *
           (unit_block_size(D, H) * sizeof(Element) + bias_size * sizeof(Scalar) + sizeof(bool));
  }
  ForwardPanels(void* memory, int64_t D, int64_t H)
      : weights(static_cast<Element*>(memory)),
        bias(reinterpret_cast<Scalar*>(weights + count(D, H) * unit_block_size(D, H))),
        finite(reinterpret_cast<bool*>(bias + count(D, H) * Cell::sums * w)) {}

  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t D = layer.D;
    const int64_t H = layer.H;
    Element* panel = weights + p * unit_block_size(D, H);
    if constexpr (!std::is_same_v<Element, Storage>) {
      if (layer.panels) return convert_block(layer, p);
    }
    pack_bias<Cell>(layer, p, bias + p * Cell::sums * w);
    finite[p] = !layer.in_place.weight_hh;
    for (int64_t g = 0; g < Cell::weight_blocks; ++g, panel += (D + H) * w) {
      if (!layer.in_place.weight_ih) {
        pack_transposed(block_of(layer.weight_ih, Cell::input_block(g), H, D), D, H, p * w, panel);
      }
      if (layer.in_place.weight_hh) continue;
      pack_transposed(block_of(layer.weight_hh, g, H, H), H, H, p * w, panel + D * w);
      finite[p] &= all_finite(panel + D * w, H * w);
    }
  }

  // Copies unit block p from the layer's panels.
  void convert_block(const Layer<Storage>& layer, int64_t p) const {
    const Prepared from(const_cast<void*>(layer.panels), layer.D, layer.H);
    const int64_t at = p * unit_block_size(layer.D, layer.H), bias_at = p * Cell::sums * w;
    convert(from.weights + at, weights + at, unit_block_size(layer.D, layer.H));
    convert(from.bias + bias_at, bias + bias_at, Cell::sums * w);
    finite[p] = from.finite[p];
  }

  // Copies the weights of unit block p back to row-major weights.
  void unpack(int64_t D, int64_t H, int64_t p, Storage* weight_ih, Storage* weight_hh) const {
    static_assert(std::is_same_v<Element, Storage>);
    const Element* panel = weights + p * unit_block_size(D, H);
    for (int64_t g = 0; g < Cell::weight_blocks; ++g, panel += (D + H) * w) {
      unpack_panel(D, H, p * w, w, weight_ih + Cell::input_block(g) * H * D,
                   [&](int64_t k, int64_t j) { return panel[k * w + j]; });
      unpack_panel(H, H, p * w, w, weight_hh + g * H * H,
                   [&](int64_t k, int64_t j) { return panel[(D + k) * w + j]; });
    }
  }
};

// Holds weight_hh in the format that the backward recurrence reads: panels of W_hh
// [weight_blocks * H, H].
template <class Cell, class Storage>
struct RecurrencePanels {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;

  static int64_t count(int64_t, int64_t H) { return panel_count<Scalar>(H); }
  static size_t bytes(int64_t, int64_t H) {
    return panels_size<Scalar>(Cell::weight_blocks * H, H) * sizeof(Scalar);
  }
  RecurrencePanels(void* memory, int64_t, int64_t) : weights(static_cast<Scalar*>(memory)) {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t K = Cell::weight_blocks * layer.H;
    namernn_fast::pack(layer.weight_hh, K, layer.H, p * w, weights + p * K * w);
  }
};

// Packs all of a layer's panels for one pass into `memory`, in the format Panels.
template <class Panels, class Storage>
void pack_all(const Layer<Storage>& layer, void* memory, const Runtime& runtime) {
  const Panels panels(memory, layer.D, layer.H);
  const int64_t count = Panels::count(layer.D, layer.H);
  const double elements = double(layer.D + layer.H) * double(layer.H);
  const int64_t workers = min64(count, choose_workers(kPackingCost * elements, runtime.machine));
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t p = count * begin / workers; p < count * end / workers; ++p) {
      panels.pack(layer, p);
    }
  });
}

// Copies all weights from panels in the format Panels back to row-major weights.
template <class Panels, class Storage>
void unpack_all(const void* panels, int64_t D, int64_t H, Storage* weight_ih, Storage* weight_hh) {
  const Panels from(const_cast<void*>(panels), D, H);
  for (int64_t p = 0; p < Panels::count(D, H); ++p) from.unpack(D, H, p, weight_ih, weight_hh);
}

// Where the groups of a plan read the weights in panels. If choose_copies() returns true, each
// group packs its own copy. A copy that fits in the private cache of a core is then already in the
// cache of the core that reads it. Otherwise all groups share one copy.
struct WeightCopies {
  char* memory;
  size_t stride;  // bytes from one group's copy to the next; 0 if all groups share one copy
  bool packed;    // whether the panels are already packed; if not, each part packs its own columns
};

// Decides where the groups read the weights: in `panels`, unless it is null. Otherwise allocates
// memory for panels, and packs the panels if all groups share one copy.
template <class Panels, class Storage>
inline WeightCopies weight_copies(const Layer<Storage>& layer, const void* panels, const Plan& plan,
                                  const Runtime& runtime) {
  if (panels) return {static_cast<char*>(const_cast<void*>(panels)), 0, true};
  const size_t bytes = (Panels::bytes(layer.D, layer.H) + 63) / 64 * 64;
  if (choose_copies(bytes, plan, runtime.machine)) {
    return {static_cast<char*>(runtime.scratch(bytes * plan.groups)), bytes, false};
  }
  void* memory = runtime.scratch(bytes);
  pack_all<Panels>(layer, memory, runtime);
  return {static_cast<char*>(memory), 0, true};
}

// Returns the weights for one part. Packs the part's columns first unless they are already packed.
template <class Panels, class Storage>
inline Panels weights_for(const Part& part, const Layer<Storage>& layer,
                          const WeightCopies& copies) {
  const Panels panels(copies.memory + part.group * copies.stride, layer.D, layer.H);
  for (int64_t j = part.columns.first; !copies.packed && j < part.columns.last; j += Panels::w) {
    panels.pack(layer, j / Panels::w);
  }
  return panels;
}

}  // namespace
}  // namespace namernn_fast
