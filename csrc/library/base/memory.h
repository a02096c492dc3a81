// Provides scratch memory that stays reserved between calls, and requests huge pages.
//
// The first access to a page of new memory causes a page fault, which may take longer than
// computing the page's contents. A segment causes page faults only the first time it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace namernn_fast {

// Uninitialized memory of at least a given size. The constructor reuses reserved memory if a block
// fits, and otherwise maps new memory. The destructor keeps the memory reserved for any thread.
class Segment {
 public:
  Segment() = default;
  explicit Segment(size_t bytes);  // throws std::bad_alloc
  ~Segment();
  Segment(Segment&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Segment& operator=(Segment&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

constexpr size_t kHugePage = size_t(2) << 20;  // bytes

// Maximum total size in bytes of the reserved segments of all threads. The forward pass of an LSTM
// with 2,048 inputs and hidden units needs half of this size.
constexpr size_t kMostReserved = size_t(256) << 20;

// Returns the total size in bytes of the reserved segments.
int64_t memory_reserved();

// Returns all reserved segments to the operating system.
void empty_cache();

// Asks the operating system to store `data` in huge pages, which must hold no other data. No-op if
// the system does not support such a request.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace namernn_fast
