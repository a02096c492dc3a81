// The weights of a layer in panels: their formats, who packs them, and where each group reads them.
#pragma once

#include "kernel/cell.h"
#include "kernel/panels.h"
#include "kernel/sharing.h"

namespace namernn_fast {
namespace {

// The sum of both biases for the columns of one panel, which begin at `first`.
template <class Storage, class Scalar>
inline void pack_bias(const Layer<Storage>& layer, int64_t first, Scalar* bias) {
  constexpr int64_t w = Shape<Scalar>::panel_width;
  alignas(64) Scalar other[w];
  pack_row(layer.bias_ih, kGates * layer.H, first, bias);
  pack_row(layer.bias_hh, kGates * layer.H, first, other);
  for (int64_t j = 0; j < w; ++j) bias[j] += other[j];
}

// The weights of a layer as the forward pass reads them, in one piece of memory, panel by panel.
template <class Storage>
struct ForwardPanels {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;  // panels of [D + H, kGates * H]: W_ih^T over W_hh^T
  Scalar* bias;     // [panels * panel_width], both biases summed
  bool* finite;     // [panels], whether weight_hh is known to be: then a state of zeros needs no
                    // product

  static int64_t count(int64_t, int64_t H) { return panel_count<Scalar>(kGates * H); }
  static size_t bytes(int64_t D, int64_t H) {
    return count(D, H) * ((D + H + 1) * w * sizeof(Scalar) + sizeof(bool));
  }
  ForwardPanels(void* memory, int64_t D, int64_t H)
      : weights(static_cast<Scalar*>(memory)),
        bias(weights + panels_size<Scalar>(D + H, kGates * H)),
        finite(reinterpret_cast<bool*>(bias + count(D, H) * w)) {}

  void pack(const Layer<Storage>& layer, int64_t p) const {
    Scalar* panel = weights + p * (layer.D + layer.H) * w;
    if (!layer.in_place.weight_ih) {
      pack_transposed(layer.weight_ih, layer.D, kGates * layer.H, p * w, panel);
    }
    pack_bias(layer, p * w, bias + p * w);
    finite[p] = false;
    if (layer.in_place.weight_hh) return;
    pack_transposed(layer.weight_hh, layer.H, kGates * layer.H, p * w, panel + layer.D * w);
    finite[p] = all_finite(panel + layer.D * w, layer.H * w);
  }
};

// weight_hh as the backward recurrence reads it: panels of W_hh [kGates * H, H].
template <class Storage>
struct RecurrencePanels {
  using Scalar = Compute<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  Scalar* weights;

  static int64_t count(int64_t, int64_t H) { return panel_count<Scalar>(H); }
  static size_t bytes(int64_t, int64_t H) {
    return panels_size<Scalar>(kGates * H, H) * sizeof(Scalar);
  }
  RecurrencePanels(void* memory, int64_t, int64_t) : weights(static_cast<Scalar*>(memory)) {}
  void pack(const Layer<Storage>& layer, int64_t p) const {
    const int64_t K = kGates * layer.H;
    namernn_fast::pack(layer.weight_hh, K, layer.H, p * w, weights + p * K * w);
  }
};

// Packs all the panels of a layer that one pass reads.
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

// Where the parts of a plan find the weights in panels: all in one place, or, where the weights fit
// into the cores' own caches, each group in a copy that it packs itself and need not fetch.
struct WeightCopies {
  char* memory;
  size_t stride;  // from a group's copy to the next
  bool packed;    // else each part packs its own columns
};

constexpr size_t kMaxCopies = size_t(4) << 20;  // bytes

template <class Panels, class Storage>
inline WeightCopies weight_copies(const Layer<Storage>& layer, const Plan& plan,
                                  const Runtime& runtime) {
  if (layer.panels) return {static_cast<char*>(const_cast<void*>(layer.panels)), 0, true};
  const size_t bytes = (Panels::bytes(layer.D, layer.H) + 63) / 64 * 64;
  if (plan.groups == 1 ||
      (bytes <= runtime.machine.l2_bytes && bytes * plan.groups <= kMaxCopies)) {
    return {static_cast<char*>(runtime.scratch(bytes * plan.groups)), bytes, false};
  }
  void* memory = runtime.scratch(bytes);
  pack_all<Panels>(layer, memory, runtime);
  return {static_cast<char*>(memory), 0, true};
}

// The weights for one part, which packs its own columns where nobody has.
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
