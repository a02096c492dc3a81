// Code shared by the native tests: memory that exposes out-of-bounds accesses and uninitialized
// reads, random numbers, and the Runtime that kernels need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "contract.h"
#include "plan.h"

namespace namernn_fast {

// Defined in emulated_pairs.cpp.
extern const KernelsFor<BFloat16> kernels_emulated_pairs;
extern const KernelsFor<float> kernels_emulated_float[kMostTerms];

// A cell compiled for one instruction set.
struct TestedCell : Cell {
  std::string title;  // names the instruction set and the cell
  CellKind kind;      // which equation of plain.h the cell computes
  bool projects;      // whether layers with more than one hidden unit project h
  bool in_floats;     // whether the kernels support heads and given sums
};

// Checks the errors of the functions of programs. Defined in functions.cpp.
void check_functions(const Kernels& kernels, const std::string& title);

// Compares results on prefix trees and on separate sequences. Defined in trees.cpp.
void check_trees(const TestedCell& cell, const Kernels& kernels);

// Compares the kernels with plain loops, and checks how much accuracy gradients lose when they
// become subnormal. `bits` is the number of significant bits of the numbers that float kernels
// multiply. Defined in accuracy.cpp.
void check_accuracy(const TestedCell& cell, const Kernels& kernels);
void check_accuracy(const TestedCell& cell, const KernelsFor<BFloat16>& kernels);
void check_accuracy(const TestedCell& cell, const KernelsFor<float>& kernels, int bits);

// Prints `what` and ends the process with status 1.
[[noreturn]] void fail(const char* what);

// Memory filled with bytes that are NaN in every floating-point type. An inaccessible page follows
// this memory, so an access past the end faults even in instructions that no sanitizer checks.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  char* map_;
  char* data_;
  size_t mapped_;
};

// When the threads of a parallel region start. With `in_pairs`, each thread does the work of two
// threads. With `alone`, one thread does all the work.
enum class Arrival { together, late, in_pairs, alone };

// The plan (instead of a plan from plan.cpp) and the Arrival that the next runs use.
extern Plan forced_plan;
extern Arrival arrival;

// Returns the Runtime of a machine with this many threads and this size of L2 cache.
Runtime runtime_of(int64_t threads, size_t l2_bytes);

// Frees all scratch memory taken so far.
void free_scratch();

class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }
  // Draws a value of either sign whose magnitude is at most about 2^-exponent.
  void draw(float& value, int exponent) { value = float(real(exponent)); }
  void draw(double& value, int exponent) { value = real(exponent); }
  void draw(BFloat16& value, int exponent) {
    value.bits = uint16_t((bits() & 0x807f) | (126u - unsigned(exponent)) << 7);
  }
  void draw(Half& value, int exponent) {
    value.bits = uint16_t((bits() & 0x83ff) | (14u - unsigned(exponent)) << 10);
  }

 private:
  double real(int exponent) { return (bits() / 2147483648.0 - 1) / double(1 << exponent); }
  uint64_t state_ = 1;
};

// For each storage type: the type that kernels compute in, a type of higher precision, and the
// number of significant bits stored.
template <class Storage>
using Computed = std::conditional_t<sizeof(Storage) == 8, double, float>;
template <class Storage>
using Higher = std::conditional_t<sizeof(Storage) == 8, long double, double>;
template <class Storage>
constexpr int kBits = std::numeric_limits<Storage>::digits;
template <>
inline constexpr int kBits<BFloat16> = 8;
template <>
inline constexpr int kBits<Half> = 11;

inline double number(float value) { return value; }
inline double number(double value) { return value; }
inline double number(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline double number(Half value) {
  const int exponent = value.bits >> 10 & 31;
  const double fraction = value.bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return value.bits >> 15 ? -size : size;
}

inline bool is_finite(double value) { return std::isfinite(value); }
inline bool is_finite(BFloat16 value) { return (value.bits & 0x7f80) != 0x7f80; }
inline bool is_finite(Half value) { return (value.bits & 0x7c00) != 0x7c00; }

// An array in guarded memory.
template <class Element>
class Array {
 public:
  explicit Array(int64_t size)
      : size_(size), memory_(std::make_unique<Guarded>(size * sizeof(Element), sizeof(Element))) {}
  Array(int64_t size, Random& random, int exponent) : Array(size) { draw(random, exponent); }
  explicit Array(const std::vector<Element>& values) : Array(int64_t(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  void draw(Random& random, int exponent) {
    for (int64_t i = 0; i < size_; ++i) random.draw(data()[i], exponent);
  }
  int64_t size() const { return size_; }
  Element* data() const { return reinterpret_cast<Element*>(memory_->data()); }
  Element* data_or_null() const { return size_ ? data() : nullptr; }
  bool operator==(const Array& other) const {
    return std::memcmp(data(), other.data(), size_ * sizeof(Element)) == 0;
  }
  // Counts the finite elements. An element that was never written is NaN.
  int64_t count_finite() const {
    int64_t count = 0;
    for (int64_t i = 0; i < size_; ++i) count += namernn_fast::is_finite(data()[i]);
    return count;
  }
  bool is_finite() const { return count_finite() == size_; }

 private:
  int64_t size_;
  std::unique_ptr<Guarded> memory_;
};

// Returns whether all elements are equal up to rounding, relative to the largest element of
// `first`.
template <class Storage>
bool agree(const Array<Storage>& first, const Array<Storage>& second) {
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < first.size(); ++i) {
    const double a = number(first.data()[i]), b = number(second.data()[i]);
    largest = std::fmax(largest, std::fabs(a));
    difference = std::fmax(difference, std::fabs(a - b));
  }
  const double tolerance = sizeof(Storage) == 8 ? 1e-12 : sizeof(Storage) == 4 ? 1e-4 : 0x1p-6;
  return difference <= tolerance * largest;
}

// Returns the smallest number of heads, besides 1, into which H units can be split.
inline int64_t fewest_heads(int64_t H) {
  for (int64_t heads = 2; heads < H; ++heads) {
    if (H % heads == 0) return heads;
  }
  return H;
}

// Packs the layer's weights into panels in `memory`, and returns the layer with these panels. The
// returned layer lacks the unpacked weights, except weights that are read in place.
template <class Storage>
Layer<Storage> with_panels(const PanelFormat<Storage>& format, Layer<Storage> layer,
                           std::unique_ptr<Guarded>& memory, const Runtime& runtime) {
  memory = std::make_unique<Guarded>(format.bytes(layer), 64);
  format.pack(layer, memory->data(), runtime);
  free_scratch();
  layer.panels = memory->data();
  if (!layer.in_place.weight_ih) layer.parameters[kWeightIh] = nullptr;
  if (!layer.in_place.weight_hh) layer.parameters[kWeightHh] = nullptr;
  layer.parameters[kWeightHr] = nullptr;
  if (!layer.table.ids.data) layer.parameters[kBiasIh] = layer.parameters[kBiasHh] = nullptr;
  return layer;
}

}  // namespace namernn_fast
