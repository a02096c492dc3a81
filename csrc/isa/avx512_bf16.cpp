// bfloat16 on AVX-512 BF16, for processors that run its dot products of pairs at twice the rate of
// float multiply-adds.
#define NAMERNN_VECTOR_BYTES 64
#define NAMERNN_REGISTERS 32
#include <cstring>

#include "contract.h"
#include "kernel/simd.h"

namespace namernn_fast {
namespace {

constexpr const Kernels& kKernelsInFloat = kernels_avx512;

// kernel/bfloat16_forward.h describes the interface of PairTile.
struct PairTile {
  static constexpr int64_t rows = 6;

  // Computes multiply() for kRows rows. kRows is a constant so that the sums stay in registers.
  template <bool kAdd, int kRows>
  static void block(const BFloat16* a, int64_t a_row, int64_t K, const BFloat16* panel, float* c) {
    constexpr int lanes = 16;
    __m512 sum[kRows][4] = {};
#pragma GCC unroll 6
    for (int r = 0; kAdd && r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_loadu_ps(c + (r * 4 + v) * lanes);
    }
    for (int64_t k = 0; k < K; k += 2) {
      __m512bh b[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        b[v] = (__m512bh)_mm512_loadu_si512(panel + (k / 2 * 4 + v) * 2 * lanes);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * a_row + k, sizeof(pair));
        const __m512bh ar = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], b[v], ar);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) _mm512_storeu_ps(c + (r * 4 + v) * lanes, sum[r][v]);
    }
  }

  template <bool kAdd>
  void multiply(const BFloat16* a, int64_t a_row, int64_t K, int64_t height, const BFloat16* panel,
                float* c) {
    constexpr void (*blocks[])(const BFloat16*, int64_t, int64_t, const BFloat16*, float*) = {
        &block<kAdd, 1>, &block<kAdd, 2>, &block<kAdd, 3>,
        &block<kAdd, 4>, &block<kAdd, 5>, &block<kAdd, 6>};
    blocks[height - 1](a, a_row, K, panel, c);
  }
};

}  // namespace
}  // namespace namernn_fast

#include "kernel/bfloat16_table.h"

namespace namernn_fast {
const KernelsOnPairs kernels_avx512_bf16 = kernels_on_pairs();
}  // namespace namernn_fast
