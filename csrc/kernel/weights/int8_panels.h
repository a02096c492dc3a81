// Stores a layer's weights as 8-bit integers, and encodes rows to multiply with these weights.
#pragma once

#include "kernel/products/int8_products.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

// Holds a layer's weights: panels of W_ih^T and panels of W_hh^T. Each panel ends with two numbers
// per column: kOffset times the sum of the column's integers, and the column's scale.
template <class Storage>
struct Int8Panels {
  static_assert(std::is_same_v<Storage, float>);
  static constexpr int64_t w = kWidth;

  int8_t* inputs;  // [unit blocks, gates] panels of W_ih^T, in the order of the sums
  int8_t* states;  // [unit blocks, gates] panels of W_hh^T
  float* bias;     // [unit blocks, sums, panel_width], see pack_bias()
  Own<float> own;

  static int64_t count(const Layer<float>& layer) { return panel_count<float>(layer.H); }
  static int64_t panel_bytes(int64_t K) { return (padded_bytes(K) + 8) * w; }
  static int64_t input_bytes(int64_t D) { return D ? panel_bytes(D) : 0; }
  static size_t block_bytes(const Layer<float>& layer) {
    const Cell& cell = *layer.cell;
    return size_t(cell.gates * (input_bytes(layer.D) + panel_bytes(layer.H))) +
           (cell.sums + own_blocks(cell)) * w * sizeof(float);
  }
  static size_t bytes(const Layer<float>& layer) { return count(layer) * block_bytes(layer); }
  Int8Panels(void* memory, const Layer<float>& layer, int64_t blocks)
      : inputs(static_cast<int8_t*>(memory)),
        states(inputs + blocks * layer.cell->gates * input_bytes(layer.D)),
        bias(reinterpret_cast<float*>(states + blocks * layer.cell->gates * panel_bytes(layer.H))),
        own{bias + blocks * layer.cell->sums * w, blocks * w} {}
  Int8Panels(void* memory, const Layer<float>& layer) : Int8Panels(memory, layer, count(layer)) {}

  float* bias_of(const Cell& cell, int64_t p) const { return bias + p * cell.sums * w; }
  static int64_t own_unit(int64_t p) { return p * w; }

  // Calls f(s, input_panel, state_panel) for each sum s of unit block p. A panel is null if its
  // weight does not contribute to the sum.
  template <class F>
  void for_each_panel(const Layer<float>& layer, int64_t p, F&& f) const {
    const Cell& cell = *layer.cell;
    for (int64_t s = 0; s < cell.sums; ++s) {
      const int64_t g = s - cell.first_state_sum;
      f(s, s < cell.gates ? inputs + (p * cell.gates + s) * input_bytes(layer.D) : nullptr,
        g >= 0 ? states + (p * cell.gates + g) * panel_bytes(layer.H) : nullptr);
    }
  }

  void pack(const Layer<float>& layer, int64_t p) const {
    const Cell& cell = *layer.cell;
    const int64_t D = layer.D, H = layer.H;
    for_each_panel(layer, p, [&](int64_t s, int8_t* of_input, int8_t* of_state) {
      if (of_input && D > 0) {
        const float* block = block_of(layer.parameters[kWeightIh], cell.input_block[s], H, D);
        pack_panel(block, D, H, p * w, of_input);
      }
      if (of_state) {
        const int64_t g = s - cell.first_state_sum;
        pack_panel(block_of(layer.parameters[kWeightHh], g, H, H), H, H, p * w, of_state);
      }
    });
    pack_bias(layer, p, bias_of(cell, p));
    pack_own(layer, p, own, own_unit(p));
  }

  // Dequantizes the weights of unit block p into row-major weights.
  void unpack(const Layer<float>& layer, int64_t p, float* const (&to)[kParameters]) const {
    const int64_t D = layer.D, H = layer.H;
    for_each_panel(layer, p, [&](int64_t s, const int8_t* of_input, const int8_t* of_state) {
      if (of_input && D > 0) {
        const int64_t block = layer.cell->input_block[s];
        unpack_panel(D, H, p * w, w, to[kWeightIh] + block * H * D, elements_of(of_input, D));
      }
      if (of_state) {
        const int64_t g = s - layer.cell->first_state_sum;
        unpack_panel(H, H, p * w, w, to[kWeightHh] + g * H * H, elements_of(of_state, H));
      }
    });
  }

 private:
  // Packs the panel of W^T that starts at column `first`, from a row-major W [width, K].
  static void pack_panel(const float* weight, int64_t K, int64_t width, int64_t first,
                         int8_t* panel) {
    fill_zeros(panel, panel_bytes(K));
    int8_t* const tail = panel + padded_bytes(K) * w;
    for (int64_t j = 0; j < min64(w, width - first); ++j) {
      const float* row = weight + (first + j) * K;
      const float scale = scale_of(row, K, 0);
      int32_t sum = 0;
      quantize(row, K, scale, [&](int64_t i, int64_t m, Int q) {
        for (int64_t l = 0; l < m; ++l) {
          panel[place_in_panel(i + l, j)] = int8_t(q[l]);
          sum += int8_t(q[l]);
        }
      });
      sum *= kOffset;
      std::memcpy(tail + j * 4, &sum, sizeof(sum));
      std::memcpy(tail + (w + j) * 4, &scale, sizeof(scale));
    }
  }

  // Returns a function that maps (k, j) to element (k, j) of a panel [K, panel_width].
  static auto elements_of(const int8_t* panel, int64_t K) {
    return [=](int64_t k, int64_t j) {
      float scale = 0;
      std::memcpy(&scale, panel + padded_bytes(K) * w + (w + j) * 4, sizeof(scale));
      return float(panel[place_in_panel(k, j)]) * scale;
    };
  }
};

// Encodes rows as 8-bit integers for forward_encoded(). TheTile is VectorTile or AmxTile.
template <class TheTile>
struct AsInt8 {
  using Tile = TheTile;
  using Operands = Int8Operands;
  using Row = uint8_t*;
  using State = float*;
  template <class Storage>
  using Panels = Int8Panels<Storage>;
  static constexpr size_t weight_bytes = 1;
  static constexpr double speed = kWideCodes ? 1.5 : 4;

  // Inputs may have any distribution, so they are stored with twice the precision.
  static int64_t input_size(int64_t n) { return (kWideCodes ? 1 : 2) * row_bytes(n); }
  static int64_t row_size(int64_t n) { return row_bytes(n); }
  static int64_t state_size(int64_t n) { return panel_count<float>(n) * kWidth; }
  static Int8Operands operands_of_inputs(const uint8_t* row, int64_t n, const int8_t* panel) {
    return {row, input_size(n), padded_bytes(n), panel, kWideCodes ? 0 : row_bytes(n), kFineChain};
  }
  static Int8Operands operands_of_states(const uint8_t* row, int64_t n, const int8_t* panel) {
    return {row, row_size(n), padded_bytes(n), panel, 0, padded_bytes(n)};
  }
  static void encode(const float* from, uint8_t* to, int64_t n) { quantize_row_twice(from, n, to); }
  // States exceed 1 in magnitude only after a large initial state or with unbounded activations.
  // Otherwise, scaling for a magnitude of at least 1 gives the same scale at every step.
  static void encode_state(const float* from, uint8_t* to, int64_t n) {
    quantize_row(from, n, 1, to);
  }
  // The padding may have any value, because it is multiplied by zeros.
  static uint8_t* scratch_rows(const Runtime& runtime, int64_t rows, int64_t, int64_t size) {
    return scratch<uint8_t>(runtime, rows * size);
  }
};

}  // namespace
}  // namespace namernn_fast
