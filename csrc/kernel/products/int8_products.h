// Multiplies rows and panels of 8-bit integers. Sums of integers are exact, so they do not depend
// on the instruction set, on the tile or on how work is split.
#pragma once

#include "kernel/products/int8_rows.h"
#include "kernel/products/panels.h"

namespace namernn_fast {
namespace {

// The operands of a product A B: a few rows of A and one panel of B.
struct Int8Operands {
  const uint8_t* a;     // A, row by row, each as quantize_row() or quantize_row_twice() writes it
  int64_t a_row;        // row stride of A, in bytes
  int64_t K;            // number of columns of A and rows of B, including padding
  const int8_t* panel;  // B, in the format of Int8Panels
  int64_t second;  // bytes from a row of A to its errors (quantize_row_twice()); 0 without errors
};

constexpr int64_t kWidth = Shape<float>::panel_width;
// A panel consists of blocks of kRowGranule rows and kGroup columns, ordered by row, then by
// column. An AMX tile register holds one block, stored as [kRowGranule / 4, kGroup, 4].
constexpr int64_t kGroup = kWidth < 16 ? kWidth : 16;
constexpr int64_t kBlockBytes = kRowGranule * kGroup;
constexpr int64_t kQuadBytes = 4 * kGroup;  // bytes of four rows in a block

// Returns the index of an element of B in its panel.
inline int64_t place_in_panel(int64_t k, int64_t j) {
  const int64_t rows = k / kRowGranule * kRowGranule, row = k % kRowGranule;
  return rows * kWidth + j / kGroup * kBlockBytes + row / 4 * kQuadBytes + j % kGroup * 4 + k % 4;
}

// Quad broadcasts four adjacent codes of a row of A to a whole vector.
using QuadBits = std::conditional_t<sizeof(Code) == 1, int32_t, int64_t>;
typedef QuadBits Quad __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
inline Quad load_quad(const uint8_t* p) {
  QuadBits quad = 0;
  std::memcpy(&quad, p, sizeof(quad));
  return Quad{} + quad;
}

// `Weights` holds four rows and kColumns columns of B. dot(sums, w, a) multiplies w by four numbers
// of A and adds the products to `sums`, which has kPartial lanes per column.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kPartial = 1;
using Weights = Int;
inline Weights load_weights(const int8_t* p) {
  Weights w;
  std::memcpy(&w, p, sizeof(w));
  return w;
}
inline Int dot(Int sums, Weights w, Quad a) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)w);
#else
  return (Int)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)w);
#endif
}
#else
constexpr int kPartial = 2;
typedef int16_t Weights __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
inline Weights load_weights(const int8_t* p) {
#if defined(__AVX2__)
  return (Weights)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  typedef int8_t Bytes __attribute__((vector_size(NAMERNN_VECTOR_BYTES / 2)));
  Bytes w;
  std::memcpy(&w, p, sizeof(w));
  return __builtin_convertvector(w, Weights);
#endif
}
inline Int dot(Int sums, Weights w, Quad a) {
#if defined(__AVX2__)
  return sums + (Int)_mm256_madd_epi16((__m256i)w, (__m256i)a);
#elif defined(__SSE2__)
  return sums + (Int)_mm_madd_epi16((__m128i)w, (__m128i)a);
#else
  int16_t numbers[2][2 * Simd<float>::lanes];
  std::memcpy(numbers[0], &w, sizeof(w));
  std::memcpy(numbers[1], &a, sizeof(a));
  for (int l = 0; l < 2 * Simd<float>::lanes; ++l) {
    sums[l / 2] += int32_t(numbers[0][l]) * numbers[1][l];
  }
  return sums;
#endif
}
#endif
constexpr int kColumns = Simd<float>::lanes / kPartial;
constexpr int kVectors = kWidth / kColumns;
// Number of rows that multiply_rows() computes at once, with all sums in registers.
constexpr int kRowsAtOnce = kPartial == 1 ? 6 : 2;
// Returns how many chains multiply_rows() splits each sum into, for `rows` rows.
constexpr int chains_for(int rows) { return kPartial == 2 || rows > 2 ? 1 : 4 / rows; }

// Adds up the kPartial partial sums of each column.
inline Int whole_sums(const Int* sums) {
  if constexpr (kPartial == 1) return sums[0];
  Int whole;
  for (int l = 0; l < Simd<float>::lanes; ++l) {
    const Int& from = sums[l / kColumns];
    whole[l] = from[l % kColumns * 2] + from[l % kColumns * 2 + 1];
  }
  return whole;
}

// Writes row r of start + A B to c. Row r of A is the sum of kEach integer rows. `sum(e, v)`
// returns vector v of the integer product of the e-th such row and B.
template <int kEach, class F>
inline void write_row(const Int8Operands& operand, int64_t r, const float* start, float* c,
                      F&& sum) {
  const int8_t* const tail = operand.panel + operand.K * kWidth;
  const uint8_t* const a = operand.a + r * operand.a_row + scale_at(operand.K);
  float scale[kEach];
  for (int e = 0; e < kEach; ++e) std::memcpy(&scale[e], a + e * operand.second, sizeof(float));
  constexpr int lanes = Simd<float>::lanes;
#pragma GCC unroll 4
  for (int v = 0; v < kWidth / lanes; ++v) {
    Int offset;
    Vec<float> scales;
    std::memcpy(&offset, tail + v * sizeof(Int), sizeof(offset));
    std::memcpy(&scales, tail + (kWidth * 4 + v * sizeof(Int)), sizeof(scales));
    Vec<float> total = start ? load(start + r * kWidth + v * lanes) : Vec<float>{};
    for (int e = 0; e < kEach; ++e) {
      const Vec<float> product = __builtin_convertvector(sum(e, v) - offset, Vec<float>);
      total += product * scales * scale[e];
    }
    store(c + r * kWidth + v * lanes, total);
  }
}

// Computes kRows rows of a product. Each sum is split into kChains interleaved chains, so that
// fewer multiplications wait for the previous result.
template <int kRows, int kEach, int kChains>
void multiply_rows(const Int8Operands& operand, const float* start, float* c) {
  Int sums[kChains][kRows * kEach][kVectors] = {};
  for (int64_t first = 0; first < operand.K; first += kRowGranule) {
    for (int64_t k = 0; k < kRowGranule; k += 4 * kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) {
        const int8_t* panel = operand.panel + first * kWidth + (k / 4 + chain) * kQuadBytes;
        Weights w[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          constexpr int per_group = kGroup / kColumns;
          w[v] = load_weights(panel + v / per_group * kBlockBytes + v % per_group * 4 * kColumns);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows * kEach; ++r) {
          const int64_t row = r / kEach * operand.a_row + r % kEach * operand.second;
          const int64_t at = (first + k + 4 * chain) * int64_t(sizeof(Code));
          const Quad quad = load_quad(operand.a + row + at);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sums[chain][r][v] = dot(sums[chain][r][v], w[v], quad);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows * kEach; ++r) {
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[0][r][v] += sums[chain][r][v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    write_row<kEach>(operand, r, start, c, [&](int e, int v) {
      return whole_sums(sums[0][r * kEach + e] + v * kPartial);
    });
  }
}

// Computes `height` rows of a product A B. Each row of A is the sum of kEach rows of integers.
template <int kEach, int... kIndices>
void multiply_few(Int8Operands operand, int64_t height, const float* start, float* c,
                  std::integer_sequence<int, kIndices...>) {
  constexpr void (*multiply[])(const Int8Operands&, const float*, float*) = {
      &multiply_rows<kIndices + 1, kEach, chains_for((kIndices + 1) * kEach)>...};
  constexpr int64_t most = sizeof...(kIndices);
  for (int64_t r = 0; r < height; r += most) {
    multiply[min64(most, height - r) - 1](operand, start, c);
    operand.a += most * operand.a_row;
    if (start) start += most * kWidth;
    c += most * kWidth;
  }
}
inline void multiply_few(const Int8Operands& operand, int64_t height, const float* start,
                         float* c) {
  if (operand.second) {
    multiply_few<2>(operand, height, start, c, std::make_integer_sequence<int, kRowsAtOnce / 2>());
  } else {
    multiply_few<1>(operand, height, start, c, std::make_integer_sequence<int, kRowsAtOnce>());
  }
}

// Writes start + the products of all operands to c. Calls multiply_one() once per operand.
template <class F>
inline void add_products(const Int8Operands* operands, int count, int64_t height,
                         const float* start, float* c, F&& multiply_one) {
  if (count == 0) {
    const size_t bytes = size_t(height * kWidth) * sizeof(float);
    start ? void(std::memmove(c, start, bytes)) : void(std::memset(c, 0, bytes));
  }
  for (int o = 0; o < count; ++o) multiply_one(operands[o], o == 0 ? start : c);
}

// Computes a tile with vector instructions. AMX uses AmxTile instead. See pair_panels.h.
struct VectorTile {
  static constexpr int64_t rows = 24;

  void multiply(const Int8Operands* operands, int count, int64_t height, const float* start,
                float* c) {
    add_products(operands, count, height, start, c,
                 [&](const Int8Operands& operand, const float* first) {
                   multiply_few(operand, height, first, c);
                 });
  }
  void multiply_row(const Int8Operands* operands, int count, const float* start, float* c) {
    multiply(operands, count, 1, start, c);
  }
};

}  // namespace
}  // namespace namernn_fast
