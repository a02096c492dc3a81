// Defines the vector types of one instruction set, using the compiler's vector extension, and
// functions that load and store whole and partial vectors. A file in csrc/isa/ defines
// NAMERNN_VECTOR_BYTES and NAMERNN_REGISTERS (the number of vector registers) before it includes
// this header.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "arithmetic.h"
#include "contract.h"
#include "expect.h"

namespace namernn_fast {
namespace {

// The integer type that has the same size as Scalar.
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

// V is a vector of Scalar. I and Unsigned are vectors of integers of the same size. Unaligned is
// like V, but may be at any address.
template <class Scalar>
struct Simd {
  using Int = typename Bits<Scalar>::Int;
  typedef Scalar V __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
  typedef std::make_unsigned_t<Int> Unsigned __attribute__((vector_size(NAMERNN_VECTOR_BYTES)));
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

// Loads or stores the first n lanes, 0 <= n < lanes. The other lanes load as zero, and their memory
// is not accessed.
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

// Calls f(offset, n) for consecutive vectors that together cover 0 .. width. n is less than `lanes`
// only in the last vector.
template <class Scalar, class F>
inline void for_each_vector(int64_t width, F&& f) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) f(i, lanes);
  if (i < width) f(i, width - i);
}

// Loads or stores the first n lanes, 0 <= n <= lanes.
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

// Returns the first n lanes of v, 0 <= n <= lanes, with zeros in the other lanes.
template <class Scalar>
inline Vec<Scalar> first_lanes(Vec<Scalar> v, int64_t n) {
  if (n == Simd<Scalar>::lanes) return v;
  Scalar all[Simd<Scalar>::lanes];
  store(all, v);
  return load_first(all, n);
}

}  // namespace
}  // namespace namernn_fast
