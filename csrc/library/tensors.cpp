#include "library/tensors.h"

#include <cstring>

#include "library/runtime.h"

namespace namernn_fast {
namespace {

// Copies the elements of a strided array to contiguous memory, and returns the end of the copy.
char* copy_elements(const char* from, const int64_t* sizes, const int64_t* strides, int64_t dims,
                    size_t element, char* to) {
  if (dims == 0) {
    std::memcpy(to, from, element);
    return to + element;
  }
  for (int64_t i = 0; i < sizes[0]; ++i) {
    const char* slice = from + i * strides[0] * int64_t(element);
    to = copy_elements(slice, sizes + 1, strides + 1, dims - 1, element, to);
  }
  return to;
}

}  // namespace

Tensor contiguous_copy(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  // Avoids torch's contiguous(), because the stable ABI does not report why contiguous() fails.
  Tensor copy = empty(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype_of(tensor));
  if (!is_pool_lost()) return torch::stable::copy_(copy, tensor);
  copy_elements(const_data<char>(tensor), sizes.data(), tensor.strides().data(), tensor.dim(),
                tensor.element_size(), mutable_data<char>(copy));
  return copy;
}

}  // namespace namernn_fast
