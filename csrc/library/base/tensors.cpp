#include "library/base/tensors.h"

#include <algorithm>

#include "library/base/memory.h"

namespace namernn_fast {
namespace {

// glibc maps allocations of at least this size separately, and unmaps them when they are freed. So
// no other data is on a large tensor's pages, and advice about the pages ends with the tensor.
constexpr size_t kMappedAlone = size_t(32) << 20;

// Minimum size in bytes of a tensor to put in a segment. Sanitizer builds put all tensors there.
#if defined(NAMERNN_FAST_SANITIZE)
constexpr size_t kLarge = 0;
#else
constexpr size_t kLarge = kHugePage / 2;
#endif

// The strides of a contiguous tensor, which has at most four dimensions.
struct Strides {
  explicit Strides(const std::vector<int64_t>& sizes) {
    check(sizes.size() <= 4, "a tensor must have at most 4 dimensions, got ", sizes.size());
    for (size_t i = sizes.size(); i-- > 1;) {
      values[i - 1] = values[i] * std::max<int64_t>(1, sizes[i]);
    }
  }
  int64_t values[4] = {1, 1, 1, 1};
};

size_t count_elements(const std::vector<int64_t>& sizes) {
  return size_t(product_of("a tensor", sizes));
}

}  // namespace

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  const size_t count = count_elements(sizes);
  const Strides strides(sizes);
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.values, dtype,
                               aoti_torch_device_type_cpu(), 0, &handle);
  if (error != AOTI_TORCH_SUCCESS) fail("no memory for a tensor of shape ", shape_text(sizes));
  const Tensor tensor(handle);
  if (count < kMappedAlone / sizeof(double)) return tensor;  // fast path: small in every dtype
  const size_t bytes = count * tensor.element_size();
  if (bytes >= kMappedAlone) advise_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

Tensor zeros(const std::vector<int64_t>& sizes, int32_t dtype) {
  const Tensor tensor = empty(sizes, dtype);
  std::fill_n(mutable_data<char>(tensor), size_t(tensor.numel()) * tensor.element_size(), 0);
  return tensor;
}

Tensor empty_in(Segment& segment, const std::vector<int64_t>& sizes, int32_t dtype) {
  const size_t bytes = count_elements(sizes) * size_t(element_size(dtype));
  if (bytes < kLarge) return empty(sizes, dtype);
  segment = Segment();  // frees the old memory first, so that it can be reused
  segment = Segment(bytes);
  const Strides strides(sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
      segment.data(), int64_t(sizes.size()), sizes.data(), strides.values, 0, dtype,
      aoti_torch_device_type_cpu(), 0, &handle, aoti_torch_layout_strided(), nullptr, 0));
  return Tensor(handle);
}

Tensor contiguous_copy(const Tensor& tensor) {
  // Avoids torch's contiguous(), because the stable ABI does not report why contiguous() fails.
  Tensor copy = uninitialized_like(tensor);
  return torch::stable::copy_(copy, tensor);
}

}  // namespace namernn_fast
