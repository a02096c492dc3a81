// Stores numbers as bfloat16 terms, for instructions that multiply pairs of bfloat16.
//
// A number is stored as one or two terms. The first term is the number rounded to bfloat16. The
// second term is the error of the first, also rounded to bfloat16. With two terms, multiplying two
// numbers takes three products. The product of both second terms is left out, because it would be
// smaller than the rounding errors.
#pragma once

#include "kernel/products/panels.h"

namespace namernn_fast {
namespace {

// Points to the first of several adjacent numbers, each stored as kTerms terms.
template <int kTerms>
struct Terms {
  BFloat16* first;   // the first terms
  int64_t distance;  // from a number's first term to its second, in elements

  Terms operator+(int64_t n) const { return {first + n, distance}; }
  explicit operator bool() const { return first != nullptr; }
  BFloat16* term(int n) const { return first + n * distance; }
};

// Returns each lane rounded to bfloat16, in the lower half of a word. The AVX-512 instruction
// flushes subnormals to zero, as the pair products would.
inline Word rounded_bits(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (Word)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  return bfloat16_bits(v);
#endif
}

// Rounds two vectors to bfloat16 and packs them into one vector: first `low`, then `high`.
inline Vec<float> rounded_numbers(Vec<float> low, Vec<float> high) {
  Vec<float> rounded;
#if defined(__AVX512BF16__)
  rounded = (Vec<float>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  const Short halves[2] = {narrow(low, BFloat16()), narrow(high, BFloat16())};
  std::memcpy(&rounded, halves, sizeof(rounded));
#endif
  return rounded;
}

// Returns each lane minus its first term. Returns zero if this difference is not finite, because
// the lane is not finite or rounds to infinity.
inline Vec<float> rest_of(Vec<float> v) {
  constexpr uint32_t exponent = 0x7f800000u;
  const Word rest = (Word)(v - (Vec<float>)(rounded_bits(v) << 16));
  return (Vec<float>)(rest & (Word)((rest & exponent) != exponent));
}

// Splits the number in each lane of v into terms, each in the lower half of a word.
template <int kTerms>
inline void split(Vec<float> v, Word (&terms)[kTerms]) {
  terms[0] = rounded_bits(v);
  if constexpr (kTerms == 2) terms[1] = rounded_bits(rest_of(v));
}

// Loads n numbers as terms, each in the lower half of a word.
template <int kTerms>
inline void load_terms(const BFloat16* p, int64_t n, Word (&terms)[kTerms]) {
  static_assert(kTerms == 1);
  terms[0] = (Word)load_upto(p, n) >> 16;
}
template <int kTerms>
inline void load_terms(const float* p, int64_t n, Word (&terms)[kTerms]) {
  split(load_upto(p, n), terms);
}

template <int kTerms>
inline Vec<float> load_upto(const Terms<kTerms>& from, int64_t n) {
  Vec<float> sum = load_upto(from.first, n);
  for (int t = 1; t < kTerms; ++t) sum += load_upto(from.term(t), n);
  return sum;
}

template <int kTerms>
inline void store_upto(const Terms<kTerms>& to, Vec<float> v, int64_t n) {
  Word terms[kTerms];
  split(v, terms);
  for (int t = 0; t < kTerms; ++t) {
    const Short bits = __builtin_convertvector(terms[t], Short);
    std::memcpy(to.term(t), &bits, n * sizeof(BFloat16));
  }
}

// Stores n numbers as terms.
inline void convert(const BFloat16* from, const Terms<1>& to, int64_t n) {
  std::memcpy(to.first, from, n * sizeof(BFloat16));
}
template <int kTerms>
inline void convert(const float* from, const Terms<kTerms>& to, int64_t n) {
  for_each_vector<float>(
      n, [&](int64_t i, int64_t m) { store_upto(to + i, load_upto(from + i, m), m); });
}

// The operands of a product A B: a few rows of A and one panel of B.
template <int kTerms>
struct PairOperands {
  Terms<kTerms> a;      // A, row by row
  int64_t a_row;        // row stride of A, in elements
  int64_t K;            // number of columns of A and rows of B, including padding
  Terms<kTerms> panel;  // B, packed into a panel
};

template <int kTerms>
inline void fill_zeros(const Terms<kTerms>& to, int64_t n) {
  for (int t = 0; t < kTerms; ++t) fill_zeros(to.term(t), n);
}

template <int kTerms>
inline bool all_finite(const Terms<kTerms>& from, int64_t n) {
  return all_finite(from.first, n);  // if the first term is finite, so is the second
}

}  // namespace
}  // namespace namernn_fast
