// Errors of the operators. Every message starts with the name of the package.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace namernn_fast {

// Throws an error that Python receives as a RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "namernn_fast: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Calls fail() with the parts of the message if the condition is false.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// Returns the shape as text, such as (2, 3).
template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  for (auto size = sizes.begin(); size != sizes.end(); ++size) {
    text << (size == sizes.begin() ? "" : ", ") << *size;
  }
  text << ")";
  return text.str();
}

// Maximum product of sizes that come from a caller. No machine has memory for this many numbers,
// and the sum of a few such products, counted in bytes, is still less than 2^63.
constexpr int64_t kMostElements = int64_t(1) << 52;

// Returns the product of sizes. Fails if a size is negative, or if the product of the nonzero sizes
// exceeds kMostElements; this check bounds the strides as well. Every product of a caller's sizes
// must be computed or bounded by this function.
template <class Sizes = std::initializer_list<int64_t>>
int64_t product_of(const char* what, const Sizes& sizes) {
  int64_t product = 1;
  bool fits = true, is_zero = false, is_negative = false;
  for (const int64_t size : sizes) {
    fits &= !__builtin_mul_overflow(product, std::max<int64_t>(1, size), &product);
    is_zero |= size == 0;
    is_negative |= size < 0;
  }
  if (is_negative) {
    fail(what, " must not have negative sizes, got ", shape_text(sizes));
  }
  if (!fits || product > kMostElements) {
    fail("no memory for ", what, " of shape ", shape_text(sizes));
  }
  return is_zero ? 0 : product;
}

}  // namespace namernn_fast
