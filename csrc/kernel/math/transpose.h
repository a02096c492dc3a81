// Transposes a square matrix in registers. A function call would spill the vectors to memory, so
// the functions in this file are always inlined.
#pragma once

#include <utility>

#include "kernel/math/simd.h"

namespace namernn_fast {
namespace {

// Returns a shuffle index for one round of the butterfly transpose. Rows a and b (b is `distance`
// rows below a) exchange squares of `distance` lanes across the diagonal. merge_low() returns the
// index for lane l of the new a, and merge_high() for lane l of the new b. An index i < lanes means
// lane i of the old a; an index lanes + i means lane i of the old b.
constexpr int merge_low(int l, int distance, int lanes) {
  return l & distance ? lanes + (l ^ distance) : l;
}
constexpr int merge_high(int l, int distance, int lanes) {
  return l & distance ? lanes + l : (l ^ distance);
}

template <class Scalar, int kDistance, int... kLane>
[[gnu::always_inline]] inline void merge(Vec<Scalar>& a, Vec<Scalar>& b,
                                         std::integer_sequence<int, kLane...>) {
  constexpr int lanes = Simd<Scalar>::lanes;
  const Vec<Scalar> low = __builtin_shufflevector(a, b, merge_low(kLane, kDistance, lanes)...);
  b = __builtin_shufflevector(a, b, merge_high(kLane, kDistance, lanes)...);
  a = low;
}

template <class Scalar, int kDistance = Simd<Scalar>::lanes / 2>
[[gnu::always_inline]] inline void transpose(Vec<Scalar> (&rows)[Simd<Scalar>::lanes]) {
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
