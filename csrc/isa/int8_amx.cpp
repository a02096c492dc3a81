// Kernels for 8-bit weights on AMX. Products with few rows use AVX-512 VNNI instead.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include "contract.h"
#include "kernel/products/amx_registers.h"
#include "kernel/tables/int8_table.h"

namespace namernn_fast {
namespace {

// Products with at most this many rows do not use tile registers.
constexpr int64_t kFewRows = 4;

// Tile registers 0 to 3 hold a 2 x 2 block of sums, registers 4 and 5 hold rows of A, and registers
// 6 and 7 hold columns of the panel.
struct AmxTile : AmxRegisters {
  static constexpr int64_t rows = 32;

  void multiply(const Int8Operands* operands, int count, int64_t height, const float* start,
                float* c) {
    add_products(operands, count, height, start, c,
                 [&](const Int8Operands& operand, const float* first) {
                   if (height <= kFewRows) return multiply_few(operand, height, first, c);
                   operand.second ? multiply_one<2>(operand, height, first, c)
                                  : multiply_one<1>(operand, height, first, c);
                 });
  }
  void multiply_row(const Int8Operands* operands, int count, const float* start, float* c) {
    multiply(operands, count, 1, start, c);
  }

 private:
  static constexpr int64_t kRegisterRows = 16;

  alignas(64) int32_t sums_[2 * rows * kWidth];

  template <int kEach>
  void multiply_one(const Int8Operands& operand, int64_t height, const float* start, float* c) {
    const bool tall = height > kRegisterRows;
    const int64_t each_rows = tall ? rows : kRegisterRows;  // stride of e in sums_, in rows
    for (int64_t half = 0; half < 2; ++half) {
      if (tall) {
        for (int e = 0; e < kEach; ++e) {
          const uint8_t* a = operand.a + e * operand.second;
          columns<true>(operand, a, a + kRegisterRows * operand.a_row, half,
                        sums_ + e * rows * kWidth);
        }
      } else {
        columns<kEach == 2>(operand, operand.a, operand.a + operand.second, half, sums_);
      }
    }
    for (int64_t r = 0; r < height; ++r) {
      write_row<kEach>(operand, r, start, c, [&](int e, int v) {
        Int sums;
        std::memcpy(&sums, sums_ + (e * each_rows + r) * kWidth + v * 16, sizeof(sums));
        return sums;
      });
    }
  }

  // Multiplies the 16 rows at `a` and, if `kTwo`, also the 16 rows at `b` by one half of the
  // panel's columns.
  template <bool kTwo>
  static void columns(const Int8Operands& operand, const uint8_t* a, const uint8_t* b, int64_t half,
                      int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < operand.K; k += kRowGranule) {
      const int8_t* panel = operand.panel + k * kWidth + half * 2 * kBlockBytes;
      _tile_loadd(4, a + k, operand.a_row);
      _tile_loadd(6, panel, kDotBytes);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, panel + kBlockBytes, kDotBytes);
      _tile_dpbusd(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, b + k, operand.a_row);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    }
    sums += half * 32;
    _tile_stored(0, sums, kWidth * 4);
    _tile_stored(1, sums + 16, kWidth * 4);
    if constexpr (kTwo) {
      _tile_stored(2, sums + kRegisterRows * kWidth, kWidth * 4);
      _tile_stored(3, sums + kRegisterRows * kWidth + 16, kWidth * 4);
    }
  }
};

}  // namespace

const Int8Kernels int8_kernels_amx = int8_kernels<AmxTile>("amx_int8");
}  // namespace namernn_fast
