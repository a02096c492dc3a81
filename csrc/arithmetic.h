// Arithmetic that csrc/library/ and csrc/kernel/ share. Like everything in csrc/kernel/ it has
// internal linkage, because each instruction set compiles it anew.
#pragma once

#include <cstdint>

namespace namernn_fast {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// sum += addend, and leaves in `addend` what rounding lost: exact, by Knuth's TwoSum, for finite
// values; otherwise zero. For a number or a SIMD vector.
template <class Value>
inline void add_keeping_error(Value& sum, Value& addend) {
  const Value total = sum + addend;
  const Value added = total - sum;
  const Value lost = (sum - (total - added)) + (addend - added);
  sum = total;
  addend = lost == lost ? lost : Value{};
}

}  // namespace
}  // namespace namernn_fast
