// Loads and stores 16-bit types: loads widen to vectors of float, and stores round to nearest even.
#pragma once

#include "kernel/math/simd.h"

namespace namernn_fast {
namespace {

// Vectors of 16-bit and 32-bit integers, with as many lanes as a vector of float.
typedef uint16_t Short __attribute__((vector_size(NAMERNN_VECTOR_BYTES / 2)));
typedef uint32_t Word __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));

inline Vec<float> widen(Short bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, Word) << 16);
}

// Returns each lane rounded to bfloat16, in the lower half of a word.
inline Word bfloat16_bits(Vec<float> v) {
  const Word bits = (Word)v;
  const Word rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Word nan = (Word)(v != v);
  return (rounded & ~nan) | (nan & 0x7fc0u);
}

inline Short narrow(Vec<float> v, BFloat16) {
  return __builtin_convertvector(bfloat16_bits(v), Short);
}

#if defined(__AVX512F__)
inline Vec<float> widen(Short bits, Half) { return (Vec<float>)_mm512_cvtph_ps((__m256i)bits); }
inline Short narrow(Vec<float> v, Half) {
  return (Short)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
inline Vec<float> widen(Short bits, Half) { return (Vec<float>)_mm256_cvtph_ps((__m128i)bits); }
inline Short narrow(Vec<float> v, Half) {
  return (Short)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline Vec<float> widen(Short bits, Half) {
  const Word wide = __builtin_convertvector(bits, Word);
  const Word magnitude = wide & 0x7fffu;
  const Word normal =
      (magnitude << 13) + (112u << 23);  // the exponent bias is 15 in half, 127 in float
  const Word subnormal = (Word)(__builtin_convertvector(magnitude, Vec<float>) * 0x1p-24f);
  const Word is_subnormal = (Word)(magnitude < 0x400u);
  const Word special = (Word)(magnitude >= 0x7c00u);
  const Word finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  return (Vec<float>)((finite | (special & 0x7f800000u)) | (wide & 0x8000u) << 16);
}
inline Short narrow(Vec<float> v, Half) {
  const Word bits = (Word)v;
  const Word magnitude = bits & 0x7fffffffu;
  const Word sign = bits >> 16 & 0x8000u;
  const Word normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Half-precision numbers below 2^-14 are subnormal. Adding 0.5 rounds such a number to a multiple
  // of 2^-24, held in the low bits.
  const Word small = (Word)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const Word is_small = (Word)(magnitude < 113u << 23);
  const Word is_large = (Word)(magnitude >= 0x477ff000u);
  const Word is_nan = (Word)(magnitude > 0x7f800000u);
  Word half = (normal & ~is_small) | (small & is_small);
  half = (half & ~is_large) | (is_large & 0x7c00u) | (is_nan & 0x200u);
  return __builtin_convertvector(half | sign, Short);
}
#endif

// Relative cost of loading and widening a vector: 1 for Half if converted natively, otherwise 2.
template <class Storage>
constexpr int64_t kLoadingCost = 2;
#if defined(__AVX512F__) || defined(__F16C__)
template <>
constexpr int64_t kLoadingCost<Half> = 1;
#endif

template <class Storage>
inline Vec<float> load_short(const Storage* p, int64_t n) {
  Short bits = {};
  std::memcpy(&bits, p, n * sizeof(Storage));
  return widen(bits, Storage());
}
// A constant n lets memcpy compile to a single load or store.
inline Vec<float> load_upto(const BFloat16* p, int64_t n) {
  return n == Simd<float>::lanes ? load_short(p, Simd<float>::lanes) : load_short(p, n);
}
inline Vec<float> load_upto(const Half* p, int64_t n) {
  return n == Simd<float>::lanes ? load_short(p, Simd<float>::lanes) : load_short(p, n);
}

template <class Storage>
inline void store_short(Storage* p, Vec<float> v, int64_t n) {
  const Short bits = narrow(v, Storage());
  std::memcpy(p, &bits, n * sizeof(Storage));
}
inline void store_upto(BFloat16* p, Vec<float> v, int64_t n) {
  n == Simd<float>::lanes ? store_short(p, v, Simd<float>::lanes) : store_short(p, v, n);
}
inline void store_upto(Half* p, Vec<float> v, int64_t n) {
  n == Simd<float>::lanes ? store_short(p, v, Simd<float>::lanes) : store_short(p, v, n);
}

// Converts n elements from one storage type to another.
template <class To, class From>
inline void convert(const From* from, To* to, int64_t n) {
  for_each_vector<Compute<From>>(
      n, [&](int64_t i, int64_t m) { store_upto(to + i, load_upto(from + i, m), m); });
}

// Adds n elements to the elements at `to`.
template <class To, class From>
inline void add(const From* from, To* to, int64_t n) {
  for_each_vector<Compute<To>>(n, [=](int64_t i, int64_t m) {
    store_upto(to + i, load_upto(to + i, m) + load_upto(from + i, m), m);
  });
}

template <class Scalar>
inline void fill_zeros(Scalar* to, int64_t n) {
  std::memset(to, 0, n * sizeof(Scalar));
}

}  // namespace
}  // namespace namernn_fast
