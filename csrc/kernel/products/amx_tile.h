// Uses AMX to multiply numbers stored as bfloat16 terms.
#pragma once

#include "contract.h"
#include "kernel/products/amx_registers.h"
#include "kernel/products/dot_pairs.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_avx512;

// pair_panels.h describes the interface of PairTile. Tile registers 0 to 3 hold a 2 x 2 block of C,
// registers 4 and 5 hold rows of A, and registers 6 and 7 hold columns of the panel.
struct PairTile : AmxRegisters {
  static constexpr int64_t rows = 32;

  template <int kTerms>
  void multiply(const PairOperands<kTerms>* operands, int count, int64_t height, const float* start,
                float* c) {
    for (int64_t half = 0; half < 2; ++half) {
      const float* half_start = start ? start + half * 32 : nullptr;
      height > 16 ? columns<kTerms, true>(operands, count, half, half_start, c + half * 32)
                  : columns<kTerms, false>(operands, count, half, half_start, c + half * 32);
    }
  }

  template <int kTerms>
  void multiply_row(const PairOperands<kTerms>* operands, int count, const float* start, float* c) {
    multiply_dots<kTerms, 1, 2>(operands, count, start, c);
  }

 private:
  static constexpr int64_t kPanelRow = 256;  // bytes per row of pairs in a panel, and per row of c
  static constexpr int64_t kTileElements = 32;  // bfloat16 numbers per row of a tile register

  // Multiplies 32 (if `kTall`) or 16 rows of A by one half of the panel's columns.
  template <int kTerms, bool kTall>
  static void columns(const PairOperands<kTerms>* operands, int count, int64_t half,
                      const float* start, float* c) {
    if (start) {
      _tile_loadd(0, start, kPanelRow);
      _tile_loadd(1, start + 16, kPanelRow);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    if constexpr (kTall) {
      if (start) {
        _tile_loadd(2, start + 16 * 64, kPanelRow);
        _tile_loadd(3, start + 16 * 64 + 16, kPanelRow);
      } else {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int o = 0; o < count; ++o) {
      const PairOperands<kTerms>& operand = operands[o];
      for (int64_t k = 0; k < operand.K; k += kTileElements) {
        const Terms<kTerms> a = operand.a + k;
        const Terms<kTerms> panel = operand.panel + (k * 64 + half * 64);
        load_a<kTall>(a.term(0), operand.a_row);
        if constexpr (kTerms == 2) {
          load_panel(panel.term(1));
          add_products<kTall>();
        }
        load_panel(panel.term(0));
        add_products<kTall>();
        if constexpr (kTerms == 2) {
          load_a<kTall>(a.term(1), operand.a_row);
          add_products<kTall>();
        }
      }
    }
    _tile_stored(0, c, kPanelRow);
    _tile_stored(1, c + 16, kPanelRow);
    if constexpr (kTall) {
      _tile_stored(2, c + 16 * 64, kPanelRow);
      _tile_stored(3, c + 16 * 64 + 16, kPanelRow);
    }
  }

  template <bool kTall>
  static void load_a(const BFloat16* a, int64_t a_row) {
    const int64_t a_bytes = a_row * int64_t(sizeof(BFloat16));
    _tile_loadd(4, a, a_bytes);
    if constexpr (kTall) _tile_loadd(5, a + 16 * a_row, a_bytes);
  }

  static void load_panel(const BFloat16* panel) {
    _tile_loadd(6, panel, kPanelRow);
    _tile_loadd(7, panel + 32, kPanelRow);
  }

  template <bool kTall>
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTall) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

}  // namespace
}  // namespace namernn_fast
