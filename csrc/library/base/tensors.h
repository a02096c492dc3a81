// Creates, reads and checks tensors through torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "contract.h"
#include "library/base/check.h"
#include "library/base/memory.h"

namespace namernn_fast {

using torch::stable::Tensor;

// Returns torch's integer code of a tensor's dtype, which is cheaper to get than a ScalarType.
inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Returns whether a tensor holds token ids (int64) instead of features.
inline bool has_ids(const Tensor& tensor) { return dtype_of(tensor) == aoti_torch_dtype_int64(); }

// Returns a new, uninitialized contiguous tensor.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype);

// Returns a new contiguous tensor of zeros.
Tensor zeros(const std::vector<int64_t>& sizes, int32_t dtype);

// Returns a new, uninitialized contiguous tensor of the same shape and dtype.
inline Tensor uninitialized_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty({sizes.begin(), sizes.end()}, dtype_of(tensor));
}

// Returns an uninitialized contiguous tensor for one call. A large tensor uses new memory that
// `segment` then owns, and must not outlive `segment`. A small tensor leaves `segment` unchanged.
Tensor empty_in(Segment& segment, const std::vector<int64_t>& sizes, int32_t dtype);

// Returns the address of a tensor's elements. Fails if the tensor has elements but no memory, like
// wrapper subclasses and fake tensors, which can reach a kernel in a list of tensors.
template <class Storage>
Storage* mutable_data(const Tensor& tensor) {
  void* const data = tensor.mutable_data_ptr();
  if (!data && tensor.numel() > 0) {
    fail("a tensor of shape ", shape_text(tensor.sizes()),
         " has no memory: wrapper subclasses and fake tensors have values only for the dispatcher");
  }
  return static_cast<Storage*>(data);
}
template <class Storage>
const Storage* const_data(const Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  return data ? static_cast<const Storage*>(data) : mutable_data<Storage>(tensor);
}

// A view of a CPU tensor. The caller keeps the tensor alive.
struct View {
  char* data;
  int32_t dtype;
  int64_t element;  // size of an element in bytes
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

// Returns a view of a tensor. Nothing may be written through this view.
inline View view_of(const Tensor& tensor) {
  return {const_cast<char*>(const_data<char>(tensor)),
          dtype_of(tensor),
          int64_t(tensor.element_size()),
          tensor.dim(),
          tensor.sizes().data(),
          tensor.strides().data()};
}

// Returns whether a view is contiguous.
inline bool is_dense(const View& view) {
  uint64_t stride = 1;  // unsigned, because the product may overflow if a later size is 0
  bool dense = true;
  for (int64_t i = view.dim - 1; i >= 0; stride *= uint64_t(view.sizes[i--])) {
    if (view.sizes[i] == 0) return true;
    dense &= view.sizes[i] == 1 || uint64_t(view.strides[i]) == stride;
  }
  return dense;
}

// Returns whether the feature dimension is contiguous.
inline bool has_adjacent_features(const View& view) {
  return view.strides[view.dim - 1] == 1 || view.sizes[view.dim - 1] <= 1;
}

// Calls f(Storage()), where Storage is the C++ type that stores `dtype`.
template <class F>
void with_storage(int32_t dtype, F&& f) {
  if (dtype == aoti_torch_dtype_float32()) return f(float());
  if (dtype == aoti_torch_dtype_float64()) return f(double());
  if (dtype == aoti_torch_dtype_bfloat16()) return f(BFloat16());
  if (dtype == aoti_torch_dtype_float16()) return f(Half());
  fail("input must be float32, float64, bfloat16 or float16 for the CPU kernel");
}

// Returns the size in bytes of an element of a dtype that has kernels.
inline int64_t element_size(int32_t dtype) {
  int64_t size = 0;
  with_storage(dtype, [&](auto storage) { size = int64_t(sizeof(storage)); });
  return size;
}

// Returns a contiguous copy.
Tensor contiguous_copy(const Tensor& tensor);

// Returns the tensor itself if it is contiguous, otherwise a contiguous copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : contiguous_copy(tensor);
}

// Returns the tensor itself if its feature dimension is contiguous, otherwise a contiguous copy.
inline Tensor with_adjacent_features(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : contiguous_copy(tensor);
}

// Checks that an argument of an operator is a tensor: torch passes None as an undefined tensor.
inline void check_given(const char* name, const Tensor& tensor) {
  check(tensor.defined(), name, " must be a Tensor, got None");
}

// Checks that a tensor is on the CPU and has the given dtype and shape.
template <class Sizes>
void check_tensor(const char* name, const Tensor& tensor, int32_t dtype, const Sizes& sizes) {
  check(tensor.is_cpu(), name, " must be on the CPU, like input");
  check(dtype_of(tensor) == dtype, name, " must have the dtype of input");
  const auto got = tensor.sizes();
  if (got.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), got.begin())) {
    fail(name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
  }
}

inline void check_tensor(const char* name, const Tensor& tensor, int32_t dtype,
                         std::initializer_list<int64_t> sizes) {
  check_tensor<std::initializer_list<int64_t>>(name, tensor, dtype, sizes);
}

}  // namespace namernn_fast
