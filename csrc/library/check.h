// Errors of the operators. Every message begins with the name of the package.
#pragma once

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

// Calls fail() with the parts of a message unless the condition holds.
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

}  // namespace namernn_fast
