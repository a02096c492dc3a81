// Arithmetic for csrc/library/ and csrc/kernel/. Like everything in csrc/kernel/, these functions
// have internal linkage because they are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace namernn_fast {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Adds `addend` to `sum` and leaves the exact rounding error in `addend` (Knuth's TwoSum), or zero
// if the error is NaN because the sum is not finite. Value is a number or a SIMD vector.
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
