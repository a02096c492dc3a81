// Stores rows of numbers as 8-bit integers with one scale per row: element i is about scale * q_i,
// with -127 <= q_i <= 127.
//
// The scale is the largest magnitude of the row, divided by 127 and truncated to 17 significant
// bits, so that scale * q_i is exact in float. Quantizing the numbers scale * q_i gives the same
// integers again. All steps are exact or correctly rounded, so the integers do not depend on the
// instruction set.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernel/math/half.h"

namespace namernn_fast {
namespace {

constexpr int64_t kRowGranule = 64;  // rows are padded to a multiple of this number of integers
constexpr int32_t kLargest = 127;    // the largest integer
// Rows with twice the precision have this many steps per step of the scale. Their largest integer
// is one larger than expected, because the scale is truncated.
constexpr int32_t kFineSteps = 2 * kLargest;
constexpr int32_t kLargestFine = kLargest * kFineSteps + 1;
// Rows hold an integer q as the code q + kOffset. VNNI and AMX multiply unsigned by signed bytes,
// so they need unsigned codes. Other instruction sets multiply 16-bit integers.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Code = uint8_t;
constexpr int32_t kOffset = 128;
#else
using Code = int16_t;
constexpr int32_t kOffset = 0;
#endif
constexpr bool kWideCodes = sizeof(Code) > 1;
// Rows with a smaller scale are stored as zeros, because 1 / scale might overflow.
constexpr float kSmallestScale = 0x1p-107f;

inline int64_t padded_bytes(int64_t n) { return (n + kRowGranule - 1) / kRowGranule * kRowGranule; }

using Int = Simd<float>::I;

// Returns each lane rounded to the nearest integer, ties to even.
inline Int rounded(Vec<float> v) {
#if defined(__AVX512F__)
  return (Int)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (Int)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (Int)_mm_cvtps_epi32((__m128)v);
#else
  Int integers;
  for (int l = 0; l < Simd<float>::lanes; ++l) {
    integers[l] = v[l] == v[l] ? int32_t(__builtin_rintf(v[l])) : 0;
  }
  return integers;
#endif
}

// Returns the scale of a row of n numbers, or NaN if a number is not finite. If the largest
// magnitude of the row is below `least`, uses `least` instead.
inline float scale_of(const float* row, int64_t n, float least) {
  Int largest = {};  // magnitudes as bit patterns, which sort in the same order
  for_each_vector<float>(n, [&](int64_t i, int64_t m) {
    const Int magnitude = (Int)load_upto(row + i, m) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  });
  int32_t lanes[Simd<float>::lanes], bits = 0;
  std::memcpy(lanes, &largest, sizeof(largest));
  for (const int32_t lane : lanes) bits = lane > bits ? lane : bits;
  constexpr int32_t infinity = 0x7f800000, nan = 0x7fc00000;
  float magnitude = 0;
  std::memcpy(&magnitude, &bits, sizeof(bits));
  magnitude = magnitude > least ? magnitude : least;
  float scale = magnitude / float(kLargest);
  int32_t scale_bits = 0;
  std::memcpy(&scale_bits, &scale, sizeof(scale));
  scale_bits = bits >= infinity ? nan : scale_bits & ~0x7f;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  return scale < kSmallestScale ? 0 : scale;
}

// Quantizes a row. Calls store(i, m, q) for each vector q of m integers that starts at index i.
template <class F>
inline void quantize(const float* row, int64_t n, float scale, F&& store) {
  const float inverse = scale > 0 ? 1 / scale : 0;  // 0 if the scale is NaN
  for_each_vector<float>(
      n, [&](int64_t i, int64_t m) { store(i, m, rounded(load_upto(row + i, m) * inverse)); });
}

// In memory, a row consists of padded_bytes(n) codes and the scale, and starts at a cache line.
// scale_at() and row_bytes() return the offset of the scale and the row stride in bytes.
inline int64_t scale_at(int64_t n) { return padded_bytes(n) * int64_t(sizeof(Code)); }
inline int64_t row_bytes(int64_t n) { return scale_at(n) + 64; }

// Stores n integers of a row, starting at index i.
inline void store_codes(uint8_t* row, int64_t i, Int q, int64_t n) {
  typedef Code Codes __attribute__((vector_size(NAMERNN_VECTOR_BYTES / 4 * sizeof(Code))));
  const Codes codes = __builtin_convertvector(q + kOffset, Codes);
  std::memcpy(row + i * int64_t(sizeof(Code)), &codes, size_t(n) * sizeof(Code));
}

// Quantizes a row and writes it to `to`.
inline void quantize_row(const float* row, int64_t n, float least, uint8_t* to) {
  const float scale = scale_of(row, n, least);
  quantize(row, n, scale, [&](int64_t i, int64_t m, Int q) { store_codes(to, i, q, m); });
  std::memcpy(to + scale_at(n), &scale, sizeof(scale));
}

// Quantizes a row with twice the precision. Wide codes hold integers of up to kLargestFine.
// Otherwise, writes the row that quantize_row() would write and a second row, which holds the
// errors of the first row.
inline void quantize_row_twice(const float* row, int64_t n, uint8_t* to) {
  const float scale = scale_of(row, n, 0), fine = scale / kFineSteps;
  if constexpr (kWideCodes) {
    quantize(row, n, fine, [&](int64_t i, int64_t m, Int q) { store_codes(to, i, q, m); });
    std::memcpy(to + scale_at(n), &fine, sizeof(fine));
    return;
  }
  const float inverse = fine > 0 ? 1 / fine : 0;
  uint8_t* const low = to + row_bytes(n);
  quantize(row, n, scale, [&](int64_t i, int64_t m, Int q) {
    store_codes(to, i, q, m);
    // The product is exact. The difference is exact, too, because its operands are close.
    const Vec<float> error = load_upto(row + i, m) - __builtin_convertvector(q, Vec<float>) * scale;
    store_codes(low, i, rounded(error * inverse), m);
  });
  std::memcpy(to + scale_at(n), &scale, sizeof(scale));
  std::memcpy(low + scale_at(n), &fine, sizeof(fine));
}

}  // namespace
}  // namespace namernn_fast
