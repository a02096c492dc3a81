// bfloat16 on AMX, whose tile registers hold 16 rows of 64 bytes.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "contract.h"
#include "kernel/simd.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_avx512;

// kernel/bfloat16_forward.h describes the interface of PairTile. Tile registers 0 to 3 hold a 2 x 2
// block of C, registers 4 and 5 rows of A, registers 6 and 7 columns of the panel.
struct PairTile {
  static constexpr int64_t rows = 32;

  PairTile() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = 16;
    }
    _tile_loadconfig(&configuration);
  }
  ~PairTile() { _tile_release(); }
  PairTile(const PairTile&) = delete;
  PairTile& operator=(const PairTile&) = delete;

  template <bool kAdd>
  void multiply(const BFloat16* a, int64_t a_row, int64_t K, int64_t height, const BFloat16* panel,
                float* c) {
    for (int64_t half = 0; half < 2; ++half) {
      height > 16 ? columns<kAdd, true>(a, a_row, K, panel + half * 64, c + half * 32)
                  : columns<kAdd, false>(a, a_row, K, panel + half * 64, c + half * 32);
    }
  }

 private:
  // Multiplies 32 rows of A (16 unless `kTall`) by half of the panel's columns.
  template <bool kAdd, bool kTall>
  static void columns(const BFloat16* a, int64_t a_row, int64_t K, const BFloat16* panel,
                      float* c) {
    constexpr int64_t panel_row = 256;  // bytes per row of pairs in the panel, and per row of c
    const int64_t a_bytes = a_row * int64_t(sizeof(BFloat16));
    if constexpr (kAdd) {
      _tile_loadd(0, c, panel_row);
      _tile_loadd(1, c + 16, panel_row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    if constexpr (kAdd && kTall) {
      _tile_loadd(2, c + 16 * 64, panel_row);
      _tile_loadd(3, c + 16 * 64 + 16, panel_row);
    } else if constexpr (kTall) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += kTileElements) {
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, panel + k * 64, panel_row);
      _tile_loadd(7, panel + k * 64 + 32, panel_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTall) {
        _tile_loadd(5, a + 16 * a_row + k, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, panel_row);
    _tile_stored(1, c + 16, panel_row);
    if constexpr (kTall) {
      _tile_stored(2, c + 16 * 64, panel_row);
      _tile_stored(3, c + 16 * 64 + 16, panel_row);
    }
  }

  static constexpr int64_t kTileElements = 32;  // bfloat16 values per row of a tile register
};

}  // namespace
}  // namespace namernn_fast

#include "kernel/bfloat16_table.h"

namespace namernn_fast {
const KernelsOnPairs kernels_amx = kernels_on_pairs();
}  // namespace namernn_fast
