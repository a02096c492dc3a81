// Defines the panel formats of a layer's weights, packs the weights into panels, and decides which
// copy of the panels each group reads.
#pragma once

#include <type_traits>

#include "kernel/math/half.h"
#include "kernel/products/panels.h"
#include "kernel/threads/sharing.h"

namespace namernn_fast {
namespace {

// Panels of a cell's weights are ordered by unit block. Unit block p, for the hidden units
// p * panel_width .. (p + 1) * panel_width, has one panel for each of the cell's weight blocks.

// Returns the size of h after its projection, or 0 if the layer does not project h.
template <class Storage>
inline int64_t projected_size(const Layer<Storage>& layer) {
  return layer.P < layer.H ? layer.P : 0;
}

// Returns the block with index `block` of a weight or bias that has H * row elements per block.
// Returns null if `weights` is null.
template <class Storage>
inline const Storage* block_of(const Storage* weights, int64_t block, int64_t H, int64_t row) {
  return weights ? weights + block * H * row : nullptr;
}

// Copies units first .. first + width of a sequence's start state, `start`, to `to`. Writes zeros
// if `start` is null.
template <class Storage, class State>
inline void read_start(const Storage* start, int64_t first, int64_t width, State to) {
  start ? convert(start + first, to, width) : fill_zeros(to, width);
}

// A range of `count` blocks of a weight, starting at `block`. The blocks contribute to `count`
// consecutive sums, starting at `sum`.
struct Blocks {
  int64_t sum;
  int64_t count;
  int64_t block;
};

// Returns all blocks of weight_hh.
inline Blocks state_blocks(const Cell& cell) { return {cell.first_state_sum, cell.gates, 0}; }

// Calls f(blocks) for ranges that together cover all blocks of weight_ih, in the order of their
// sums. Uses as few ranges as possible.
template <class F>
inline void for_each_input_blocks(const Cell& cell, F&& f) {
  for (Blocks blocks{}; blocks.sum < cell.gates; blocks.sum += blocks.count) {
    const int64_t sum = blocks.sum;
    blocks.block = cell.input_block[sum];
    blocks.count = 1;
    while (sum + blocks.count < cell.gates &&
           cell.input_block[sum + blocks.count] == blocks.block + blocks.count) {
      ++blocks.count;
    }
    f(blocks);
  }
}

// Writes the contribution of the biases to each sum of unit block p into `bias`: panel_width
// elements per sum.
template <class Storage, class Scalar>
inline void pack_bias(const Layer<Storage>& layer, int64_t p, Scalar* bias) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  const Cell& cell = *layer.cell;
  const int64_t H = layer.H;
  alignas(64) Scalar other[w];
  for (int64_t s = 0; s < cell.sums; ++s, bias += w) {
    const Storage* of_input = s < cell.gates ? layer.parameters[kBiasIh] : nullptr;
    const Storage* of_state = s >= cell.first_state_sum ? layer.parameters[kBiasHh] : nullptr;
    pack_row(of_input ? block_of(of_input, cell.input_block[s], H, 1) : nullptr, H, p * w, bias);
    pack_row(block_of(of_state, s - cell.first_state_sum, H, 1), H, p * w, other);
    for (int64_t j = 0; j < w; ++j) bias[j] += other[j];
  }
}

// The cell's own parameters, converted by `prepare_own` and padded to whole unit blocks.
template <class Scalar>
struct Own {
  Scalar* memory;  // [blocks of all own parameters, stride]
  int64_t stride;

  Scalar* at(int64_t block, int64_t unit) const { return memory + block * stride + unit; }
  // Sets the address of `unit` in each of the cell's own parameters.
  template <class Arguments>
  void set(const Cell& cell, int64_t unit, Arguments& rows) const {
    rows.own_stride = stride;
    for (int64_t i = 0; i < cell.own; ++i) rows.own[i] = at(own_blocks(cell, i), unit);
  }
};

// Converts unit block p of the cell's own parameters and writes it to `own`, starting at `unit`.
template <class Storage, class Scalar>
inline void pack_own(const Layer<Storage>& layer, int64_t p, const Own<Scalar>& own, int64_t unit) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  const CellCode<Storage>& code = *layer.cell;
  const Cell& cell = *layer.cell;
  for (int64_t i = 0, block = 0; i < cell.own; ++i) {
    for (int64_t n = 0; n < cell.own_blocks[i]; ++n, ++block) {
      pack_row(layer.parameters[kOwn + i] + n * layer.H, layer.H, p * w, own.at(block, unit));
      code.prepare_own(i, own.at(block, unit), w);
    }
  }
}

// Copies a panel back to a row-major weight block `to` [width, K]. The panel holds panel_width
// columns of the block's transpose, starting at column `first`. `element(k, j)` returns an element
// of the panel.
template <class Storage, class Element>
inline void unpack_panel(int64_t K, int64_t width, int64_t first, int64_t panel_width, Storage* to,
                         Element&& element) {
  for (int64_t j = 0; j < min64(panel_width, width - first); ++j) {
    for (int64_t k = 0; k < K; ++k) to[(first + j) * K + k] = element(k, j);
  }
}

// Holds a layer's weights in the format that the forward pass reads, in one allocation. Element is
// the type of the stored weights: the type that products compute in, or Storage.
template <class Storage, class Element = Compute<Storage>>
struct ForwardPanels {
  using Scalar = Compute<Storage>;
  using Prepared = ForwardPanels<Storage, Storage>;  // the format of Layer::panels
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  // [unit blocks, gates] panels of [D + R, H]: W_ih^T above W_hh^T, where R is recurrent_size().
  // Panel g of a unit block holds block input_block[g] of weight_ih and block g of weight_hh.
  Element* weights;
  Scalar* bias;  // [unit blocks, sums, panel_width], see pack_bias()
  Own<Scalar> own;
  Element* weight_hr;  // panels of W_hr^T [H, P] if the layer projects h
  // [unit blocks]: whether weight_hh is known to be finite, so that a zero state needs no product.
  // Not bool, because prepared weights may hold any bytes.
  uint8_t* finite;

  // Returns the number of unit blocks. For block p, pack() also packs panel p of weight_hr, if any.
  static int64_t count(const Layer<Storage>& layer) { return panel_count<Scalar>(layer.H); }
  // Returns the number of elements in a unit block.
  template <class Rows>
  static int64_t unit_block_size(const Layer<Rows>& layer) {
    return layer.cell->gates * (layer.D + recurrent_size(layer)) * w;
  }
  // Returns the number of elements of weight_hr.
  static int64_t projection_size(const Layer<Storage>& layer) {
    return panels_size<Scalar>(layer.H, projected_size(layer));
  }
  static size_t bytes(const Layer<Storage>& layer) {
    const int64_t blocks = count(layer);
    return (blocks * unit_block_size(layer) + projection_size(layer)) * sizeof(Element) +
           blocks * ((layer.cell->sums + own_blocks(*layer.cell)) * w * sizeof(Scalar) +
                     sizeof(*finite));
  }
  ForwardPanels(void* memory, const Layer<Storage>& layer)
      : weights(static_cast<Element*>(memory)),
        bias(reinterpret_cast<Scalar*>(weights + count(layer) * unit_block_size(layer))),
        own{bias + count(layer) * layer.cell->sums * w, count(layer) * w},
        weight_hr(reinterpret_cast<Element*>(own.at(own_blocks(*layer.cell), 0))),
        finite(reinterpret_cast<uint8_t*>(weight_hr + projection_size(layer))) {}

  void pack(const Layer<Storage>& layer, int64_t p) const {
    const Cell& cell = *layer.cell;
    const int64_t D = layer.D, H = layer.H, P = layer.P, R = recurrent_size(layer);
    Element* panel = weights + p * unit_block_size(layer);
    if constexpr (!std::is_same_v<Element, Storage>) {
      if (layer.panels) return convert_block(layer, p);
    }
    pack_bias(layer, p, bias + p * cell.sums * w);
    pack_own(layer, p, own, p * w);
    if (p * w < projected_size(layer)) {
      pack_transposed(layer.parameters[kWeightHr], H, P, p * w, weight_hr + p * H * w);
    }
    finite[p] = !layer.in_place.weight_hh;
    for (int64_t g = 0; g < cell.gates; ++g, panel += (D + R) * w) {
      if (!layer.in_place.weight_ih) {
        const Storage* block = block_of(layer.parameters[kWeightIh], cell.input_block[g], H, D);
        pack_transposed(block, D, H, p * w, panel);
      }
      if (R == 0 || layer.in_place.weight_hh) continue;
      pack_transposed(block_of(layer.parameters[kWeightHh], g, H, R), R, H, p * w, panel + D * w);
      finite[p] &= all_finite(panel + D * w, R * w);
    }
  }

  // Copies unit block p from the layer's panels.
  void convert_block(const Layer<Storage>& layer, int64_t p) const {
    const Prepared from(const_cast<void*>(layer.panels), layer);
    const int64_t sums = layer.cell->sums * w;
    const int64_t at = p * unit_block_size(layer);
    convert(from.weights + at, weights + at, unit_block_size(layer));
    convert(from.bias + p * sums, bias + p * sums, sums);
    for (int64_t i = 0; i < own_blocks(*layer.cell); ++i) {
      convert(from.own.at(i, p * w), own.at(i, p * w), w);
    }
    if (p * w < projected_size(layer)) {
      const int64_t panel = layer.H * w;
      convert(from.weight_hr + p * panel, weight_hr + p * panel, panel);
    }
    finite[p] = from.finite[p];
  }

  // Copies the weights of unit block p back to row-major weights.
  void unpack(const Layer<Storage>& layer, int64_t p, Storage* const (&to)[kParameters]) const {
    static_assert(std::is_same_v<Element, Storage>);
    const int64_t D = layer.D, H = layer.H, P = layer.P, R = recurrent_size(layer);
    const auto from = [](const Element* panel) {
      return [=](int64_t k, int64_t j) { return panel[k * w + j]; };
    };
    const Element* panel = weights + p * unit_block_size(layer);
    for (int64_t g = 0; g < layer.cell->gates; ++g, panel += (D + R) * w) {
      const int64_t block = layer.cell->input_block[g];
      unpack_panel(D, H, p * w, w, to[kWeightIh] + block * H * D, from(panel));
      if (R) unpack_panel(R, H, p * w, w, to[kWeightHh] + g * H * R, from(panel + D * w));
    }
    if (p * w < projected_size(layer)) {
      unpack_panel(H, P, p * w, w, to[kWeightHr], from(weight_hr + p * H * w));
    }
  }
};

// Holds weight_hh and weight_hr in the format that the backward recurrence reads: panels of W_hh
// [gates * H, R] and, if the layer projects h, of W_hr [P, H]. With heads, a member also reads
// panels that other members packed, but only after a barrier.
template <class Storage>
struct RecurrencePanels {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;
  Scalar* weight_hr;

  static int64_t count(const Layer<Storage>& layer) { return panel_count<Scalar>(layer.H); }
  // Returns the number of elements of `weights`.
  static int64_t size(const Layer<Storage>& layer) {
    return panels_size<Scalar>(layer.cell->gates * layer.H, recurrent_size(layer));
  }
  static size_t bytes(const Layer<Storage>& layer) {
    return (size(layer) + panels_size<Scalar>(projected_size(layer), layer.H)) * sizeof(Scalar);
  }
  RecurrencePanels(void* memory, const Layer<Storage>& layer)
      : weights(static_cast<Scalar*>(memory)), weight_hr(weights + size(layer)) {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t K = layer.cell->gates * layer.H, R = recurrent_size(layer);
    const Storage *hh = layer.parameters[kWeightHh], *hr = layer.parameters[kWeightHr];
    if (p * w < R) namernn_fast::pack(hh, K, R, p * w, weights + p * K * w);
    const int64_t rows = projected_size(layer);
    namernn_fast::pack(hr, rows, layer.H, p * w, weight_hr + p * rows * w);
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
void unpack_all(const Layer<Storage>& layer, Storage* const (&weights)[kParameters]) {
  const Panels from(const_cast<void*>(layer.panels), layer);
  for (int64_t p = 0; p < Panels::count(layer); ++p) from.unpack(layer, p, weights);
}

// Says where the groups of a plan read their weight panels. If choose_copies() returns true, each
// group packs its own copy, which may then already be in the private cache of the core that reads
// it. Otherwise all groups share one copy.
struct WeightCopies {
  char* memory;
  size_t stride;  // bytes between the copies of consecutive groups; 0 if all groups share one copy
  bool packed;    // whether the panels are already packed; if not, each part packs its own columns
};

// Decides where the groups read the weights. If `panels` is null, allocates memory for panels, and
// packs the panels if all groups share one copy. Otherwise the groups read `panels`.
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
