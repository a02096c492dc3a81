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
  int64_t chain;   // number of products to sum as integers; read only if kWideCodes
};

constexpr int64_t kWidth = Shape<float>::panel_width;
// A panel consists of blocks of kRowGranule rows and kGroup columns, ordered by row, then by
// column. An AMX tile register holds one block, stored as [kRowGranule / 4, kGroup, 4].
constexpr int64_t kGroup = kWidth < 16 ? kWidth : 16;
constexpr int64_t kBlockBytes = kRowGranule * kGroup;
constexpr int64_t kDepth = 4 / sizeof(Code);    // number of rows of B that dot() multiplies
constexpr int64_t kDotBytes = kDepth * kGroup;  // bytes of kDepth rows in a block

// Number of products of wide codes from quantize_row_twice() whose sum always fits in 32 bits, in
// whole granules.
constexpr int64_t kFineChain = INT32_MAX / (kLargestFine * kLargest) / kRowGranule * kRowGranule;

// Returns the index of an element of B in its panel.
inline int64_t place_in_panel(int64_t k, int64_t j) {
  const int64_t rows = k / kRowGranule * kRowGranule, row = k % kRowGranule;
  return rows * kWidth + j / kGroup * kBlockBytes + row / kDepth * kDotBytes + j % kGroup * kDepth +
         k % kDepth;
}

// Broadcasts kDepth adjacent codes of a row of A to all lanes.
inline Int load_codes(const uint8_t* p) {
  int32_t codes = 0;
  std::memcpy(&codes, p, sizeof(codes));
  return Int{} + codes;
}

// `Weights` holds kDepth rows of B, with one column per lane of Int. dot(sums, w, a) multiplies w
// by kDepth codes of A and adds the products of each column to its sum.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Weights = Int;
inline Weights load_weights(const int8_t* p) {
  Weights w;
  std::memcpy(&w, p, sizeof(w));
  return w;
}
inline Int dot(Int sums, Weights w, Int a) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)w);
#else
  return (Int)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)w);
#endif
}
#else
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
inline Int dot(Int sums, Weights w, Int a) {
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
constexpr int kColumns = Simd<float>::lanes;
constexpr int kVectors = kWidth / kColumns;
// Number of rows that multiply_rows() computes at once, with all sums in registers.
constexpr int kRowsAtOnce = 6;
// Returns how many chains multiply_rows() splits each sum into, for `rows` rows.
constexpr int chains_for(int rows) { return rows > 2 ? 1 : 4 / rows; }

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

// Calls f(k, rows) for each kCount * kDepth rows in rows begin .. end of a panel. `rows` points to
// row k.
template <int kCount, class F>
inline void for_each_rows(const int8_t* panel, int64_t begin, int64_t end, F&& f) {
  if constexpr (kGroup == kWidth) {  // the blocks are adjacent
    for (int64_t k = begin; k < end; k += kCount * kDepth) f(k, panel + k * kWidth);
  } else {
    for (int64_t first = begin; first < end; first += kRowGranule) {
      for (int64_t k = 0; k < kRowGranule; k += kCount * kDepth) {
        f(first + k, panel + first * kWidth + k / kDepth * kDotBytes);
      }
    }
  }
}

// Computes kRows rows of start + A B, using only rows begin .. end of B. Each sum is split into
// kChains interleaved chains, so that fewer multiplications wait for the previous result.
template <int kRows, int kEach, int kChains>
void multiply_rows(const Int8Operands& operand, int64_t begin, int64_t end, const float* start,
                   float* c) {
  Int sums[kChains][kRows * kEach][kVectors] = {};
  for_each_rows<kChains>(operand.panel, begin, end, [&](int64_t k, const int8_t* rows) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      Weights w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        constexpr int per_group = kGroup / kColumns;
        w[v] = load_weights(rows + chain * kDotBytes + v / per_group * kBlockBytes +
                            v % per_group * kDepth * kColumns);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows * kEach; ++r) {
        const int64_t row = r / kEach * operand.a_row + r % kEach * operand.second;
        const int64_t at = (k + kDepth * chain) * int64_t(sizeof(Code));
        const Int codes = load_codes(operand.a + row + at);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sums[chain][r][v] = dot(sums[chain][r][v], w[v], codes);
        }
      }
    }
  });
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
    write_row<kEach>(operand, r, start, c, [&](int e, int v) { return sums[0][r * kEach + e][v]; });
  }
}
// Computes kRows rows of a product.
template <int kRows, int kEach, int kChains>
void multiply_rows(const Int8Operands& operand, const float* start, float* c) {
  const int64_t chain = kWideCodes ? operand.chain : operand.K;
  for (int64_t k = 0; k < operand.K; k += chain) {
    const int64_t end = min64(k + chain, operand.K);
    multiply_rows<kRows, kEach, kChains>(operand, k, end, k == 0 ? start : c, c);
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
