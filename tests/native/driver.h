// What the files of this driver share: memory that shows every wrong access, random arguments, and
// what kernels need from the process they run in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "contract.h"
#include "plan.h"

namespace namernn_fast {

extern const KernelsFor<BFloat16> kernels_emulated_pairs;  // of emulated_pairs.cpp

// Runs the kernels over prefix trees, in trees.cpp.
void check_trees(const Kernels& kernels);

// Compares the kernels with plain loops, in accuracy.cpp.
void check_accuracy(const Kernels& kernels);

// Ends the process.
[[noreturn]] void fail(const char* what);

// NaN in every type, and it ends where a page begins that nobody may touch: what runs over its end
// is seen even in the instructions that no sanitizer looks into.
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

// Which threads of a parallel region come, and when.
enum class Arrival { together, late, in_pairs, alone };

// How the next run shares out its work, in place of what plan.cpp would choose.
extern Plan forced_plan;
extern Arrival arrival;

// What a kernel needs from the process, for so many threads and such a cache.
Runtime runtime_of(int64_t threads, size_t l2_bytes);

// Frees the scratch memory of all calls so far.
void free_scratch();

class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }
  // Of either sign, below 2^-exponent.
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
  bool operator==(const Array& other) const {
    return std::memcmp(data(), other.data(), size_ * sizeof(Element)) == 0;
  }
  // Whether every element was written, since memory is NaN at first, with a number.
  bool is_finite() const {
    for (int64_t i = 0; i < size_; ++i) {
      if (!namernn_fast::is_finite(data()[i])) return false;
    }
    return true;
  }

 private:
  int64_t size_;
  std::unique_ptr<Guarded> memory_;
};

// The layer with those weights in panels, packed before the pass runs, that are not read in place.
template <class Storage>
Layer<Storage> with_panels(const PanelFormat<Storage>& format, Layer<Storage> layer,
                           std::unique_ptr<Guarded>& memory, const Runtime& runtime) {
  memory = std::make_unique<Guarded>(format.bytes(layer.D, layer.H), 64);
  format.pack(layer, memory->data(), runtime);
  free_scratch();
  layer.panels = memory->data();
  if (!layer.in_place.weight_ih) layer.weight_ih = nullptr;
  if (!layer.in_place.weight_hh) layer.weight_hh = nullptr;
  if (!layer.table.ids.data) layer.bias_ih = layer.bias_hh = nullptr;
  return layer;
}

}  // namespace namernn_fast
