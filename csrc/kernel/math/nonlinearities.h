// Computes the nonlinearities of cells. The errors of tanh, the logistic sigmoid and softplus are
// at most three units in the last place.
#pragma once

#include <cmath>
#include <limits>

#include "kernel/math/simd.h"

// On x86, function calls preserve no vector registers, so calling these functions makes the caller
// spill. Inlining helps on AVX2 (16 registers) but not on AVX-512 (32 registers).
#if defined(__AVX2__) && NAMERNN_REGISTERS == 16
#define NAMERNN_INLINE [[gnu::always_inline]] inline
#else
#define NAMERNN_INLINE inline
#endif

namespace namernn_fast {
namespace {

// Returns min(limit, x), or NaN if x is NaN.
template <class Scalar>
inline Vec<Scalar> at_most(Vec<Scalar> limit, Vec<Scalar> x) {
  return x > limit ? limit : x;
}

// Returns p / q for a normal q that is far from overflow and underflow.
template <class Scalar>
inline Vec<Scalar> divide(Vec<Scalar> p, Vec<Scalar> q) {
  return p / q;
}

#if defined(__AVX512F__)
template <>
inline Vec<float> at_most<float>(Vec<float> limit, Vec<float> x) {
  return (Vec<float>)_mm512_min_ps((__m512)limit, (__m512)x);
}

// Unlike a division, a reciprocal estimate with two corrections does not stall the FMA units. The
// corrections need the exact residuals of fused multiply-adds, which compilers do not always form.
template <>
inline Vec<float> divide<float>(Vec<float> p, Vec<float> q) {
  const __m512 estimate = _mm512_rcp14_ps((__m512)q);
  const __m512 error = _mm512_fnmadd_ps((__m512)q, estimate, _mm512_set1_ps(1));
  const __m512 r = _mm512_fmadd_ps(estimate, error, estimate);
  const __m512 y = _mm512_mul_ps((__m512)p, r);
  const __m512 rest = _mm512_fnmadd_ps((__m512)q, y, (__m512)p);
  return (Vec<float>)_mm512_fmadd_ps(r, rest, y);
}
#endif

// tanh|x| = e / (e + 1) with e = expm1(2|x|) / 2. Range reduction |x| = n ln 2 / 2 + s, with an
// integer n, gives e = 2^n (s + s^2 c(s)) + (2^n - 1) / 2. The polynomial c minimizes the largest
// relative error of s + s^2 c(s) as an approximation of expm1(2s) / 2 on |s| <= ln 2 / 4. A
// least-squares fit, reweighted until all error peaks were equal, gave the coefficients. The error
// is 2^-26.2 in float and 2^-55.6 in double. Beyond `limit`, tanh rounds to 1. Signed zeros and
// subnormals are returned unchanged, and NaN stays NaN.
template <class Scalar>
struct Tanh;
template <>
struct Tanh<float> {
  static constexpr float limit = 10.0f;
  static constexpr float two_log2e = 0x1.715476p+1f;
  static constexpr float half_ln2 = 0x1.62e430p-2f;
  static constexpr float half_ln2_high = 0x1.62e4p-2f;  // the first 15 bits of half_ln2
  static constexpr float half_ln2_low = 0x1.7f7d1cp-21f;
  static constexpr float round = 0x1.8p23f;  // x + round has the rounded x in its low bits
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
  static constexpr double half_ln2_high = 0x1.62e42feep-2;  // the first 32 bits of half_ln2
  static constexpr double half_ln2_low = 0x1.a39ef35793c76p-34;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa_bits = 52;
  static constexpr double exponent_bias = 1023.0;
  static constexpr double c[] = {1.0000000000000011185,     0.66666666666666734884,
                                 0.33333333333258616458,    0.13333333333305734889,
                                 0.044444444583911969484,   0.012698412735840759582,
                                 0.0031745925564830169786,  0.0007054651113022484576,
                                 0.00014144697467484233669, 0.00002571625655054236154};
};

// Holds exp(2a) = power (2 rest + 1): power = 2^n, rest = expm1(2s) / 2, a = n ln 2 / 2 + s.
template <class Scalar>
struct Exponential {
  Vec<Scalar> power;
  Vec<Scalar> rest;
};

// Computes exp(2a) as 2^n * exp(2(a - n ln 2 / 2)). For large |n|, rounding n ln 2 / 2 costs
// accuracy; `far` avoids this by splitting ln 2 / 2 so that n * half_ln2_high is exact.
template <class Scalar, bool far>
inline Exponential<Scalar> exp_twice(Vec<Scalar> a) {
  using C = Tanh<Scalar>;
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr int terms = sizeof(C::c) / sizeof(Scalar);
  const V shifted = a * C::two_log2e + (C::round + C::exponent_bias);
  const V n = shifted - (C::round + C::exponent_bias);
  V s;
  if constexpr (far) {
    s = a - n * C::half_ln2_high;
    s -= n * C::half_ln2_low;
  } else {
    s = a - n * C::half_ln2;
  }
  V c = V{} + C::c[terms - 1];
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) c = c * s + C::c[i];
  const V power = (V)((I)shifted << C::mantissa_bits);  // 2^n: shifts n into the exponent field
  return {power, c * (s * s) + s};
}

template <class Scalar>
inline typename Simd<Scalar>::I sign_bit() {
  return typename Simd<Scalar>::I{} + (typename Simd<Scalar>::Int(1) << (sizeof(Scalar) * 8 - 1));
}

template <class Scalar>
NAMERNN_INLINE Vec<Scalar> tanh(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr Scalar half = Scalar(0.5);
  const I sign = sign_bit<Scalar>();
  const auto [power, rest] =
      exp_twice<Scalar, false>(at_most<Scalar>(V{} + Tanh<Scalar>::limit, (V)((I)x & ~sign)));
  const V e = power * rest + (power * half - half);
  return (V)((I)divide<Scalar>(e, e + Scalar(1)) | ((I)x & sign));
}

// Returns exp(-|x|), or zero if it would be subnormal.
template <class Scalar>
NAMERNN_INLINE Vec<Scalar> exp_of_negative(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr Scalar one = Scalar(1);
  constexpr Scalar most = sizeof(Scalar) == 4 ? Scalar(87) : Scalar(708);  // exp(-most) is normal
  const V negative = (V)((I)x | sign_bit<Scalar>());
  const V clamped = negative < V{} - most ? V{} - most : negative;
  const auto [power, rest] = exp_twice<Scalar, true>(clamped * Scalar(0.5));
  return negative < V{} - most ? V{} : power * (rest * Scalar(2) + one);
}

// sigmoid(x) = 1 / (1 + t) for x >= 0 and t / (1 + t) for x < 0, with t = exp(-|x|) <= 1. Unlike
// (1 + tanh(x / 2)) / 2, this formula keeps the relative error small for very negative x.
template <class Scalar>
NAMERNN_INLINE Vec<Scalar> sigmoid(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  constexpr Scalar one = Scalar(1);
  const V t = exp_of_negative<Scalar>(x);
  return divide<Scalar>(x < V{} ? t : V{} + one, t + one);
}

template <class Scalar>
inline Vec<Scalar> relu(Vec<Scalar> x) {
  return x < Vec<Scalar>{} ? Vec<Scalar>{} : x;
}

// Returns the gradient of x, given the gradient of h = relu(x).
template <class Scalar>
inline Vec<Scalar> relu_gradient(Vec<Scalar> grad, Vec<Scalar> h) {
  // Compares bits, because under FlushSubnormals h == 0 is true for a subnormal h, too.
  const auto is_zero = ((typename Simd<Scalar>::I)h << 1) == 0;
  return is_zero ? Vec<Scalar>{} : grad;
}

// softplus(x) = log(1 + exp(x)) = relu(x) + log(1 + t), with t = exp(-|x|) <= 1. The second term is
// 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 + ..), with s = t / (2 + t) <= 1 / 3.
template <class Scalar>
inline Vec<Scalar> softplus(Vec<Scalar> x) {
  constexpr int terms = sizeof(Scalar) == 4 ? 7 : 16;  // number of terms after the first
  const Vec<Scalar> t = exp_of_negative<Scalar>(x);
  const Vec<Scalar> s = divide<Scalar>(t, t + Scalar(2));
  Vec<Scalar> sum = {};
#pragma GCC unroll 16
  for (int k = terms; k > 0; --k) sum = sum * (s * s) + Scalar(1) / Scalar(2 * k + 1);
  return relu<Scalar>(x) + (s + s + (s + s) * (s * s * sum));
}

// Returns a - b. The bits of NaN and of negative numbers may overflow, which is undefined for
// signed integers.
template <class Scalar>
inline typename Simd<Scalar>::I subtract_bits(typename Simd<Scalar>::I a,
                                              typename Simd<Scalar>::I b) {
  using I = typename Simd<Scalar>::I;
  using Unsigned = typename Simd<Scalar>::Unsigned;
  return (I)((Unsigned)a - (Unsigned)b);
}

// Returns exp(x). The power of 2 is scaled so that it is neither infinite nor subnormal, even if
// the result is.
template <class Scalar>
inline Vec<Scalar> exp(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr bool is_float = sizeof(Scalar) == 4;
  constexpr Scalar most = is_float ? Scalar(89) : Scalar(710);      // exp(most) is infinite
  constexpr Scalar least = is_float ? Scalar(-105) : Scalar(-746);  // exp(least) is zero
  constexpr Scalar tiny = is_float ? Scalar(0x1p-32) : Scalar(0x1p-64);
  x = at_most<Scalar>(V{} + most, x);
  x = x < least ? V{} + least : x;
  const auto [power, rest] = exp_twice<Scalar, true>(x * Scalar(0.5));
  const I less = x > V{} ? I{} + 1 : I{} - (is_float ? 32 : 64);
  const V scaled = (V)subtract_bits<Scalar>((I)power, less << Tanh<Scalar>::mantissa_bits);
  return scaled * (rest * Scalar(2) + Scalar(1)) * (x > V{} ? V{} + Scalar(2) : V{} + tiny);
}

// Returns exp(x) - 1.
template <class Scalar>
inline Vec<Scalar> expm1(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr Scalar most = sizeof(Scalar) == 4 ? Scalar(89) : Scalar(710);
  constexpr Scalar least = Scalar(-50);  // expm1(least) rounds to -1
  x = at_most<Scalar>(V{} + most, x);
  x = x < least ? V{} + least : x;
  const auto [power, rest] = exp_twice<Scalar, true>(x * Scalar(0.5));
  const V half = (V)subtract_bits<Scalar>((I)power, (I{} + 1) << Tanh<Scalar>::mantissa_bits);
  return (half * (rest * Scalar(2)) + (half - Scalar(0.5))) * Scalar(2);
}

// Returns log(x) = e ln 2 + log(m), with x = 2^e m and m between sqrt(1/2) and sqrt(2). With
// f = m - 1 and s = f / (2 + f), log(m) = 2 artanh(s) = f - s (f - 2 (s^2 / 3 + s^4 / 5 + ..)).
template <class Scalar>
inline Vec<Scalar> log(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  using I = typename Simd<Scalar>::I;
  constexpr bool is_float = sizeof(Scalar) == 4;
  constexpr int terms = is_float ? 5 : 12;
  constexpr int bits = Tanh<Scalar>::mantissa_bits;
  constexpr Scalar smallest = is_float ? Scalar(0x1p-126) : Scalar(0x1p-1022);  // normal number
  constexpr Scalar large = is_float ? Scalar(0x1p32) : Scalar(0x1p64);
  constexpr Scalar high = is_float ? Scalar(0x1.62e4p-1) : Scalar(0x1.62e42feep-1);  // of ln 2
  constexpr Scalar low = is_float ? Scalar(0x1.7f7d1cp-20) : Scalar(0x1.a39ef35793c76p-33);
  const auto is_subnormal = x < smallest;
  const V normal = is_subnormal ? x * large : x;
  const I root = (I)(V{} + Scalar(0.70710678118654752440));
  const I exponent = subtract_bits<Scalar>((I)normal, root) >> bits;
  const V f = (V)subtract_bits<Scalar>((I)normal, exponent << bits) - Scalar(1);
  V e = __builtin_convertvector(exponent, V);
  e = is_subnormal ? e - (is_float ? Scalar(32) : Scalar(64)) : e;
  const V s = divide<Scalar>(f, f + Scalar(2)), square = s * s;
  V sum = {};
#pragma GCC unroll 16
  for (int k = terms; k > 0; --k) sum = (sum + Scalar(2) / Scalar(2 * k + 1)) * square;
  const V half = f * f * Scalar(0.5);
  const V result = e * high - ((half - (s * (half + sum) + e * low)) - f);
  const V infinity = V{} + std::numeric_limits<Scalar>::infinity();
  const V limit = x == V{}  ? -infinity
                  : x < V{} ? V{} + std::numeric_limits<Scalar>::quiet_NaN()
                            : x;
  return x > V{} && x < infinity ? result : limit;
}

// Returns log(1 + x) = log(u) + (x - (u - 1)) / u, where u is 1 + x, rounded.
template <class Scalar>
inline Vec<Scalar> log1p(Vec<Scalar> x) {
  using V = Vec<Scalar>;
  const V u = x + Scalar(1), error = x - (u - Scalar(1));
  const V infinity = V{} + std::numeric_limits<Scalar>::infinity();
  return log<Scalar>(u) + (u > V{} && u < infinity ? error / u : V{});
}

template <class Scalar>
inline Vec<Scalar> sqrt(Vec<Scalar> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Scalar) == 4)
    return (Vec<Scalar>)_mm512_sqrt_ps((__m512)x);
  else
    return (Vec<Scalar>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(Scalar) == 4)
    return (Vec<Scalar>)_mm256_sqrt_ps((__m256)x);
  else
    return (Vec<Scalar>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int lane = 0; lane < Simd<Scalar>::lanes; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

}  // namespace
}  // namespace namernn_fast
