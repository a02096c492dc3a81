// Multiplies a few rows of bfloat16 pairs with the dot products of AVX-512 BF16.
#pragma once

#include <cstring>

#include "kernel/products/terms.h"

namespace namernn_fast {
namespace {

// Implements PairTile::multiply in pair_panels.h for kRows rows. Each sum is split into kChains
// interleaved chains, so that fewer multiplications wait for the previous result. kRows and kChains
// are compile-time constants so that the sums stay in registers.
template <int kTerms, int kRows, int kChains>
void multiply_dots(const PairOperands<kTerms>* operands, int count, const float* start, float* c) {
  constexpr int lanes = Simd<float>::lanes;
  constexpr int vectors = Shape<float>::panel_vectors;
  __m512 sum[kChains][kRows][vectors] = {};
#pragma GCC unroll 6
  for (int r = 0; start && r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sum[0][r][v] = _mm512_loadu_ps(start + (r * vectors + v) * lanes);
    }
  }
  for (int o = 0; o < count; ++o) {
    const PairOperands<kTerms>& operand = operands[o];
    for (int64_t k = 0; k < operand.K; k += 2 * kChains) {
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain) {
        const auto add = [&](int term_of_a, int term_of_b) {
          const BFloat16* a = operand.a.term(term_of_a) + k + 2 * chain;
          const BFloat16* panel = operand.panel.term(term_of_b) + (k + 2 * chain) * vectors * lanes;
          __m512bh b[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            b[v] = (__m512bh)_mm512_loadu_si512(panel + v * 2 * lanes);
          }
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + r * operand.a_row, sizeof(pair));
            const __m512bh ar = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              sum[chain][r][v] = _mm512_dpbf16_ps(sum[chain][r][v], b[v], ar);
            }
          }
        };
        if constexpr (kTerms == 2) {
          add(0, 1);
          add(1, 0);
        }
        add(0, 0);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __m512 total = sum[0][r][v];
      if constexpr (kChains == 2) total += sum[1][r][v];
      _mm512_storeu_ps(c + (r * vectors + v) * lanes, total);
    }
  }
}

}  // namespace
}  // namespace namernn_fast
