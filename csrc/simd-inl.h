// The vector type of one ISA, on the compiler's own vector extension, and what is built from it.
// An including file defines NAMERNN_VECTOR_BYTES and NAMERNN_REGISTERS.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel.h"

namespace namernn_fast {
namespace {

template <class Scalar>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
};
template <>
struct Bits<double> {
  using Int = int64_t;
};

template <class Scalar>
struct Simd {
  using Int = typename Bits<Scalar>::Int;
  typedef Scalar V __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
  typedef Scalar Unaligned
      __attribute__((vector_size(NAMERNN_VECTOR_BYTES), aligned(sizeof(Scalar)), may_alias));
  static constexpr int lanes = NAMERNN_VECTOR_BYTES / sizeof(Scalar);
};

template <class Scalar>
using Vec = typename Simd<Scalar>::V;

template <class Scalar>
inline Vec<Scalar> load(const Scalar* p) {
  return *reinterpret_cast<const typename Simd<Scalar>::Unaligned*>(p);
}

template <class Scalar>
inline void store(Scalar* p, Vec<Scalar> v) {
  *reinterpret_cast<typename Simd<Scalar>::Unaligned*>(p) = v;
}

// The first n lanes in memory, 0 <= n < lanes; the others are zero and are not touched there.
#if defined(__AVX512F__)
inline Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
inline Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
inline void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
inline void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
inline __m256i first_mask(const float*, int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_mask(const double*, int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_first(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, first_mask(p, n));
}
inline Vec<double> load_first(const double* p, int64_t n) {
  return (Vec<double>)_mm256_maskload_pd(p, first_mask(p, n));
}
inline void store_first(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_mask(p, n), (__m256)v);
}
inline void store_first(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, first_mask(p, n), (__m256d)v);
}
#else
template <class Scalar>
inline Vec<Scalar> load_first(const Scalar* p, int64_t n) {
  Vec<Scalar> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class Scalar>
inline void store_first(Scalar* p, Vec<Scalar> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// Calls f(offset, n) for the vectors that cover 0 .. width; n is below `lanes` in the last only.
template <class Scalar, class F>
inline void for_each_vector(int64_t width, F&& f) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) f(i, lanes);
  if (i < width) f(i, width - i);
}

template <class Scalar, class = std::enable_if_t<std::is_floating_point_v<Scalar>>>
inline Vec<Scalar> load_upto(const Scalar* p, int64_t n) {
  return n == Simd<Scalar>::lanes ? load(p) : load_first(p, n);
}

template <class Scalar, class = std::enable_if_t<std::is_floating_point_v<Scalar>>>
inline void store_upto(Scalar* p, Vec<Scalar> v, int64_t n) {
  if (n == Simd<Scalar>::lanes) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// ---- 16-bit storage: loaded and stored as vectors of float, rounded to nearest ----

template <class Storage>
struct ComputeType {
  using Type = Storage;
};
template <>
struct ComputeType<BFloat16> {
  using Type = float;
};
template <>
struct ComputeType<Half> {
  using Type = float;
};
// What a storage type is computed in.
template <class Storage>
using Compute = typename ComputeType<Storage>::Type;

typedef uint16_t Short __attribute__((vector_size(NAMERNN_VECTOR_BYTES / 2)));
typedef uint32_t Word __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));

inline Vec<float> widen(Short bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, Word) << 16);
}

inline Short narrow(Vec<float> v, BFloat16) {
  const Word bits = (Word)v;
  const Word rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Word nan = (Word)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Short);
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
      (magnitude << 13) + (112u << 23);  // the exponent's bias is 15 here, 127 there
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
  // Below 2^-14: adding 0.5 leaves the result, rounded, in the low bits.
  const Word small = (Word)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const Word is_small = (Word)(magnitude < 113u << 23);
  const Word is_large = (Word)(magnitude >= 0x477ff000u);
  const Word is_nan = (Word)(magnitude > 0x7f800000u);
  Word half = (normal & ~is_small) | (small & is_small);
  half = (half & ~is_large) | (is_large & 0x7c00u) | (is_nan & 0x200u);
  return __builtin_convertvector(half | sign, Short);
}
#endif

template <class Storage>
inline Vec<float> load_short(const Storage* p, int64_t n) {
  Short bits = {};
  std::memcpy(&bits, p, n * sizeof(Storage));
  return widen(bits, Storage());
}
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

// Copies n elements between storage types.
template <class To, class From>
inline void convert(const From* from, To* to, int64_t n) {
  for_each_vector<Compute<From>>(
      n, [&](int64_t i, int64_t m) { store_upto(to + i, load_upto(from + i, m), m); });
}

// ---- The hyperbolic tangent ----

// The lesser of a limit and x; NaN stays NaN.
template <class Scalar>
inline Vec<Scalar> at_most(Vec<Scalar> limit, Vec<Scalar> x) {
  return x > limit ? limit : x;
}

// p / q, for q in the normal range and away from its ends.
template <class Scalar>
inline Vec<Scalar> divide(Vec<Scalar> p, Vec<Scalar> q) {
  return p / q;
}

#if defined(__AVX512F__)
template <>
inline Vec<float> at_most<float>(Vec<float> limit, Vec<float> x) {
  return (Vec<float>)_mm512_min_ps((__m512)limit, (__m512)x);
}

// A division would keep the multiply-add units waiting; an estimate and two corrections do not.
template <>
inline Vec<float> divide<float>(Vec<float> p, Vec<float> q) {
  const Vec<float> estimate = (Vec<float>)_mm512_rcp14_ps((__m512)q);
  const Vec<float> r = estimate + estimate * (1.0f - q * estimate);
  const Vec<float> y = p * r;
  return y + r * (p - q * y);
}
#endif

// tanh|x| = e / (e + 1) with e = expm1(2|x|) / 2. Range reduction |x| = n ln 2 / 2 + s gives
// e = 2^n (s + s^2 c(s)) + (2^n - 1) / 2. The polynomial c minimises the largest relative error of
// s + s^2 c(s) as expm1(2s) / 2 on |s| <= ln 2 / 4 (a least-squares fit, reweighted until the
// error is level): 2^-26.2 in float, 2^-55.6 in double. Past `limit` tanh is 1. Signed zeros and
// subnormals come back as they are, NaN stays NaN.
template <class Scalar>
struct Tanh;
template <>
struct Tanh<float> {
  static constexpr float limit = 10.0f;
  static constexpr float two_log2e = 0x1.715476p+1f;
  static constexpr float half_ln2 = 0x1.62e430p-2f;
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  static constexpr int mantissa_bits = 23;
  static constexpr float exponent_bias = 127.0f;
  static constexpr float c[] = {1.00000001239f, 0.666661717641f, 0.333330255182f, 0.133865452122f,
                                0.0446286706709f};
};
template <>
struct Tanh<double> {
  static constexpr double limit = 20.0;
  static constexpr double two_log2e = 0x1.71547652b82fep+1;
  static constexpr double half_ln2 = 0x1.62e42fefa39efp-2;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa_bits = 52;
  static constexpr double exponent_bias = 1023.0;
  static constexpr double c[] = {1.0000000000000011185,     0.66666666666666734884,
                                 0.33333333333258616458,    0.13333333333305734889,
                                 0.044444444583911969484,   0.012698412735840759582,
                                 0.0031745925564830169786,  0.0007054651113022484576,
                                 0.00014144697467484233669, 0.00002571625655054236154};
};

template <class Scalar>
inline Vec<Scalar> tanh(Vec<Scalar> x) {
  using C = Tanh<Scalar>;
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr int terms = sizeof(C::c) / sizeof(Scalar);
  constexpr Scalar half = Scalar(0.5);
  const I sign_bit = I{} + (typename Simd<Scalar>::Int(1) << (sizeof(Scalar) * 8 - 1));
  const V a = at_most<Scalar>(V{} + C::limit, (V)((I)x & ~sign_bit));
  const V shifted = a * C::two_log2e + (C::round + C::exponent_bias);
  const V n = shifted - (C::round + C::exponent_bias);
  const V s = a - n * C::half_ln2;
  V c = V{} + C::c[terms - 1];
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) c = c * s + C::c[i];
  const V power = (V)((I)shifted << C::mantissa_bits);  // 2^n: the biased n moves up to its place
  const V e = power * (c * (s * s) + s) + (power * half - half);
  return (V)((I)divide<Scalar>(e, e + Scalar(1)) | ((I)x & sign_bit));
}

// Lane l of the merge of rows a and b (b is `distance` rows below a) in one round of the
// butterfly transpose: blocks of `distance` lanes are exchanged across the diagonal.
constexpr int merge_low(int l, int distance, int lanes) {
  return l & distance ? lanes + (l ^ distance) : l;
}
constexpr int merge_high(int l, int distance, int lanes) {
  return l & distance ? lanes + l : (l ^ distance);
}

template <class Scalar, int kDistance, int... kLane>
inline void merge(Vec<Scalar>& a, Vec<Scalar>& b, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = Simd<Scalar>::lanes;
  const Vec<Scalar> low = __builtin_shufflevector(a, b, merge_low(kLane, kDistance, lanes)...);
  b = __builtin_shufflevector(a, b, merge_high(kLane, kDistance, lanes)...);
  a = low;
}

template <class Scalar, int kDistance = Simd<Scalar>::lanes / 2>
inline void transpose(Vec<Scalar> (&rows)[Simd<Scalar>::lanes]) {
  constexpr int lanes = Simd<Scalar>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (!(i & kDistance)) {
      merge<Scalar, kDistance>(rows[i], rows[i + kDistance],
                               std::make_integer_sequence<int, lanes>());
    }
  }
  if constexpr (kDistance > 1) transpose<Scalar, kDistance / 2>(rows);
}

}  // namespace
}  // namespace namernn_fast
