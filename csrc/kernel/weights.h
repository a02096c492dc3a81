// Stores a layer's weights in panels: defines the formats, packs the weights, and decides where
// each group reads them.
#pragma once

#include <type_traits>

#include "kernel/cells/cell.h"
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

// Writes the rates of unit block p to `rate` [panel_width], if the cell has rates.
template <class Cell, class Storage, class Scalar>
inline void pack_rate(const Layer<Storage>& layer, int64_t p, Scalar* rate) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  if constexpr (Cell::has_rate) {
    pack_row(layer.rate, layer.H, p * w, rate);
    for (int64_t j = 0; j < w; j += Simd<Scalar>::lanes) {
      store(rate + j, sigmoid<Scalar>(load(rate + j)));
    }
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

  Element* weights;  // [unit blocks, weight blocks] panels of [D + P, H]: W_ih^T above W_hh^T.
                     // Panel g of a unit block holds block input_block(g) of weight_ih and block g
                     // of weight_hh
  Scalar* bias;      // [unit blocks, sums, panel_width], see pack_bias()
  Scalar* rate;      // [unit blocks, panel_width], if the cell has rates
  Element* weight_hr;  // panels of W_hr^T [H, P] if the layer projects h
  uint8_t* finite;  // [unit blocks], whether weight_hh is known to be finite, so that a zero state
                    // needs no product; no bool, because prepared weights may hold any bytes

  // Returns the number of unit blocks. pack() also packs panel p of weight_hr, if there is one.
  static int64_t count(const Layer<Storage>& layer) { return panel_count<Scalar>(layer.H); }
  // Returns the number of elements from one unit block to the next.
  template <class Rows>
  static int64_t unit_block_size(const Layer<Rows>& layer) {
    return Cell::weight_blocks * (layer.D + layer.P) * w;
  }
  // Returns the number of elements of weight_hr.
  static int64_t projection_size(const Layer<Storage>& layer) {
    return panels_size<Scalar>(layer.H, projected_size<Cell>(layer));
  }
  static size_t bytes(const Layer<Storage>& layer) {
    const int64_t blocks = count(layer);
    return (blocks * unit_block_size(layer) + projection_size(layer)) * sizeof(Element) +
           blocks * ((Cell::sums + Cell::has_rate) * w * sizeof(Scalar) + sizeof(*finite));
  }
  ForwardPanels(void* memory, const Layer<Storage>& layer)
      : weights(static_cast<Element*>(memory)),
        bias(reinterpret_cast<Scalar*>(weights + count(layer) * unit_block_size(layer))),
        rate(bias + count(layer) * Cell::sums * w),
        weight_hr(reinterpret_cast<Element*>(rate + count(layer) * Cell::has_rate * w)),
        finite(reinterpret_cast<uint8_t*>(weight_hr + projection_size(layer))) {}

  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t D = layer.D, H = layer.H, P = layer.P;
    Element* panel = weights + p * unit_block_size(layer);
    if constexpr (!std::is_same_v<Element, Storage>) {
      if (layer.panels) return convert_block(layer, p);
    }
    pack_bias<Cell>(layer, p, bias + p * Cell::sums * w);
    pack_rate<Cell>(layer, p, rate + p * w);
    if (p * w < projected_size<Cell>(layer)) {
      pack_transposed(layer.weight_hr, H, P, p * w, weight_hr + p * H * w);
    }
    finite[p] = !layer.in_place.weight_hh;
    for (int64_t g = 0; g < Cell::weight_blocks; ++g, panel += (D + P) * w) {
      if (!layer.in_place.weight_ih) {
        pack_transposed(block_of(layer.weight_ih, Cell::input_block(g), H, D), D, H, p * w, panel);
      }
      if (layer.in_place.weight_hh) continue;
      pack_transposed(block_of(layer.weight_hh, g, H, P), P, H, p * w, panel + D * w);
      finite[p] &= all_finite(panel + D * w, P * w);
    }
  }

  // Copies unit block p from the layer's panels.
  void convert_block(const Layer<Storage>& layer, int64_t p) const {
    const Prepared from(const_cast<void*>(layer.panels), layer);
    const int64_t at = p * unit_block_size(layer), bias_at = p * Cell::sums * w;
    convert(from.weights + at, weights + at, unit_block_size(layer));
    convert(from.bias + bias_at, bias + bias_at, Cell::sums * w);
    if constexpr (Cell::has_rate) convert(from.rate + p * w, rate + p * w, w);
    if (p * w < projected_size<Cell>(layer)) {
      const int64_t panel = layer.H * w;
      convert(from.weight_hr + p * panel, weight_hr + p * panel, panel);
    }
    finite[p] = from.finite[p];
  }

  // Copies the weights of unit block p back to row-major weights.
  void unpack(const Layer<Storage>& layer, int64_t p, Storage* const (&to)[3]) const {
    static_assert(std::is_same_v<Element, Storage>);
    const int64_t D = layer.D, H = layer.H, P = layer.P;
    const auto from = [](const Element* panel) {
      return [=](int64_t k, int64_t j) { return panel[k * w + j]; };
    };
    const Element* panel = weights + p * unit_block_size(layer);
    for (int64_t g = 0; g < Cell::weight_blocks; ++g, panel += (D + P) * w) {
      unpack_panel(D, H, p * w, w, to[0] + Cell::input_block(g) * H * D, from(panel));
      unpack_panel(P, H, p * w, w, to[1] + g * H * P, from(panel + D * w));
    }
    if (p * w < projected_size<Cell>(layer)) {
      unpack_panel(H, P, p * w, w, to[2], from(weight_hr + p * H * w));
    }
  }
};

// Holds weight_hh and weight_hr in the format that the backward recurrence reads: panels of W_hh
// [weight_blocks * H, P] and, if the layer projects h, of W_hr [P, H].
template <class Cell, class Storage>
struct RecurrencePanels {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;
  Scalar* weight_hr;

  static int64_t count(const Layer<Storage>& layer) { return panel_count<Scalar>(layer.H); }
  // Returns the number of elements of `weights`.
  static int64_t size(const Layer<Storage>& layer) {
    return panels_size<Scalar>(Cell::weight_blocks * layer.H, layer.P);
  }
  static size_t bytes(const Layer<Storage>& layer) {
    return (size(layer) + panels_size<Scalar>(projected_size<Cell>(layer), layer.H)) *
           sizeof(Scalar);
  }
  RecurrencePanels(void* memory, const Layer<Storage>& layer)
      : weights(static_cast<Scalar*>(memory)), weight_hr(weights + size(layer)) {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t K = Cell::weight_blocks * layer.H, P = layer.P;
    if (p * w < P) namernn_fast::pack(layer.weight_hh, K, P, p * w, weights + p * K * w);
    const int64_t rows = projected_size<Cell>(layer);
    namernn_fast::pack(layer.weight_hr, rows, layer.H, p * w, weight_hr + p * rows * w);
  }
};

// Packs all of a layer's panels for one pass into `memory`, in the format Panels.
template <class Panels, class Storage>
void pack_all(const Layer<Storage>& layer, void* memory, const Runtime& runtime) {
  const Panels panels(memory, layer);
  const int64_t count = Panels::count(layer);
  const double elements = double(layer.D + layer.H) * double(layer.H);
  const int64_t workers = min64(count, choose_workers(kPackingCost * elements, runtime.machine));
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t p = count * begin / workers; p < count * end / workers; ++p) {
      panels.pack(layer, p);
    }
  });
}

// Copies all weights from the layer's panels, in the format Panels, back to row-major weights.
template <class Panels, class Storage>
void unpack_all(const Layer<Storage>& layer, Storage* const (&weights)[3]) {
  const Panels from(const_cast<void*>(layer.panels), layer);
  for (int64_t p = 0; p < Panels::count(layer); ++p) from.unpack(layer, p, weights);
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
  const size_t bytes = (Panels::bytes(layer) + 63) / 64 * 64;
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
  const Panels panels(copies.memory + part.group * copies.stride, layer);
  for (int64_t j = part.columns.first; !copies.packed && j < part.columns.last; j += Panels::w) {
    panels.pack(layer, j / Panels::w);
  }
  return panels;
}

}  // namespace
}  // namespace namernn_fast
