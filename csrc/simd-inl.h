// The vector type of one ISA, on the compiler's own vector extension, and what is built from it.
// An including file defines NAMERNN_VECTOR_BYTES and NAMERNN_REGISTERS.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

// The first n lanes; the others are zero.
template <class Scalar>
inline Vec<Scalar> load_first(const Scalar* p, int64_t n) {
  Vec<Scalar> v = {};
  std::memcpy(&v, p, n * sizeof(Scalar));
  return v;
}

template <class Scalar>
inline void store_first(Scalar* p, Vec<Scalar> v, int64_t n) {
  std::memcpy(p, &v, n * sizeof(Scalar));
}

// Calls f(offset, n) for the vectors that cover 0 .. width; n is below `lanes` in the last only.
template <class Scalar, class F>
inline void for_each_vector(int64_t width, F&& f) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes) f(i, lanes);
  if (i < width) f(i, width - i);
}

template <class Scalar>
inline Vec<Scalar> load_upto(const Scalar* p, int64_t n) {
  return n == Simd<Scalar>::lanes ? load(p) : load_first(p, n);
}

template <class Scalar>
inline void store_upto(Scalar* p, Vec<Scalar> v, int64_t n) {
  if (n == Simd<Scalar>::lanes) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// tanh|x| = e / (e + 2) with e = expm1(2|x|). Range reduction 2|x| = n ln 2 + r, |r| <= ln 2 / 2,
// gives e = 2^n p + (2^n - 1) with p = expm1(r), whose Taylor series is cut where the next term
// is below a quarter of a unit in the last place. Exact sign, NaN stays NaN, 1 past `limit`.
template <class Scalar>
struct TanhConstants;
template <>
struct TanhConstants<float> {
  static constexpr float limit = 10.0f;
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62ep-1f;  // few bits: n * ln2_high is exact
  static constexpr float ln2_low = 0x1.0bfbe8p-15f;
  static constexpr float round = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t exponent_bias = 127;
  static constexpr int terms = 7;
};
template <>
struct TanhConstants<double> {
  static constexpr double limit = 20.0;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fep-1;
  static constexpr double ln2_low = 0x1.f473de6af278fp-30;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t exponent_bias = 1023;
  static constexpr int terms = 13;
};

template <class Scalar>
constexpr Scalar inverse_factorial(int n) {
  return n <= 1 ? Scalar(1) : inverse_factorial<Scalar>(n - 1) / Scalar(n);
}

// 1/2! + r/3! + r^2/4! + ...: the Horner scheme with the coefficients folded in at compile time.
template <class Scalar, int kTerm>
inline Vec<Scalar> expm1_series(Vec<Scalar> r) {
  constexpr Scalar coefficient = inverse_factorial<Scalar>(kTerm);
  if constexpr (kTerm == TanhConstants<Scalar>::terms) {
    return Vec<Scalar>{} + coefficient;
  } else {
    return expm1_series<Scalar, kTerm + 1>(r) * r + coefficient;
  }
}

template <class Scalar>
inline Vec<Scalar> tanh(Vec<Scalar> x) {
  using C = TanhConstants<Scalar>;
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  using Int = typename Simd<Scalar>::Int;
  const I bits = (I)x;
  const I sign = bits & (Int(1) << (sizeof(Scalar) * 8 - 1));
  V a = (V)(bits ^ sign);
  const V limit = V{} + C::limit;
  a = a > limit ? limit : a;
  const V y = a + a;
  const V shifted = y * C::log2e + C::round;
  const V n = shifted - C::round;
  const V r = (y - n * C::ln2_high) - n * C::ln2_low;
  const V p = expm1_series<Scalar, 2>(r) * (r * r) + r;
  const I exponent = (I)shifted - (I)(V{} + C::round);
  const V scale = (V)((exponent + C::exponent_bias) << C::mantissa_bits);
  const V e = scale * p + (scale - Scalar(1));
  return (V)((I)(e / (e + Scalar(2))) | sign);
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
