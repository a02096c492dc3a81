// The only C++ that sees torch: checks arguments, allocates results, chooses the kernel.
// Schemas and fake kernels of these operators are in namernn_fast/ops.py.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "kernel.h"

namespace namernn_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- Errors ----

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "namernn_fast: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

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

// ---- The processor ----

const Kernels& detect_kernels() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");  // ATen's own switch, honoured here
  const std::string wanted = variable ? variable : "";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (wanted != "default" && wanted != "avx2" && avx512) return kernels_avx512;
  if (wanted != "default" && avx2) return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = detect_kernels();
  return chosen;
}

// ---- What the kernels need from the process ----

// One call's scratch memory: a block kept by each thread from call to call, so that small calls
// neither allocate nor fault pages in; what a call needs beyond it is freed with the call.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kKept = size_t(16) << 20;

  Scratch() = default;
  ~Scratch() {
    for (void* p : extra_) std::free(p);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* take(size_t bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (!kept_ && bytes <= kKept) kept_.reset(allocate(kKept));
    if (used_ + bytes <= kKept && kept_) {
      void* p = kept_.get() + used_;
      used_ += bytes;
      return p;
    }
    extra_.reserve(extra_.size() + 1);
    extra_.push_back(allocate(bytes));
    return extra_.back();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static char* allocate(size_t bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, kAlignment, std::max(bytes, kAlignment)) != 0) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
  // Untouched pages of it cost nothing.
  static thread_local std::unique_ptr<char, Free> kept_;
  size_t used_ = 0;
  std::vector<void*> extra_;
};
thread_local std::unique_ptr<char, Scratch::Free> Scratch::kept_;

thread_local Scratch* current_scratch = nullptr;

void run_in_pool(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

class Call {
 public:
  Call() { current_scratch = &scratch_; }
  ~Call() { current_scratch = nullptr; }
  Runtime runtime() const {
    return {int64_t(torch::stable::get_num_threads()), &run_in_pool,
            [](size_t bytes) { return current_scratch->take(bytes); },
            [] { std::this_thread::yield(); }};
  }

 private:
  Scratch scratch_;
};

// ---- Tensors ----

// torch's number for a dtype: cheaper to compare than its translation into a ScalarType.
int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A new contiguous tensor of the dtype of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                         strides.data(), dtype_of(like),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor with_adjacent_features(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

template <class Sizes>
void check_tensor(const char* name, const Tensor& tensor, const Tensor& input, const Sizes& sizes) {
  check(tensor.is_cpu(), name, " must be on the CPU, like input");
  check(dtype_of(tensor) == dtype_of(input), name, " must have the dtype of input");
  const auto got = tensor.sizes();
  if (got.size() != sizes.size() || !std::equal(sizes.begin(), sizes.end(), got.begin())) {
    fail(name, " must have shape ", shape_text(sizes), ", got ", shape_text(got));
  }
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& input,
                  std::initializer_list<int64_t> sizes) {
  check_tensor<std::initializer_list<int64_t>>(name, tensor, input, sizes);
}

// ---- One layer: its checked arguments, both directions ----

struct LayerTensors {
  Tensor input;
  std::optional<Tensor> hx;
  std::vector<Tensor> weights;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  Steps steps;
  int64_t D;
  int64_t H;
  int64_t directions;
  int64_t per_direction;  // weights of one direction: 2, or 4 with biases
  bool single;            // float32, else float64
  bool packed;
  bool batch_first;
  Activation activation;
};

// Sequences alive at each time, from the tensor of a PackedSequence.
void read_batch_sizes(const Tensor& batch_sizes, LayerTensors& layer) {
  check(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long &&
            batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU");
  const Tensor contiguous = dense(batch_sizes);
  const int64_t T = contiguous.numel();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  layer.count.assign(values, values + T);
  layer.start.resize(T);
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t limit = t ? layer.count[t - 1] : layer.input.size(0);
    check(layer.count[t] >= 1, "batch_sizes must be positive, got ", layer.count[t], " at step ",
          t);
    check(layer.count[t] <= limit,
          t ? "batch_sizes must not increase, got "
            : "batch_sizes must not exceed the rows of data, got ",
          layer.count[t], " after ", limit, " at step ", t);
    layer.start[t] = rows;
    rows += layer.count[t];
  }
  check(rows == layer.input.size(0), "batch_sizes must sum to the rows of data, ",
        layer.input.size(0), ", got a sum of ", rows);
  layer.steps = {T, T ? layer.count[0] : 0, rows, layer.count.data(), layer.start.data()};
}

LayerTensors check_layer(const Tensor& input, const std::optional<Tensor>& hx,
                         const std::vector<Tensor>& weights,
                         const std::optional<Tensor>& batch_sizes, const std::string& nonlinearity,
                         bool bidirectional, bool batch_first) {
  LayerTensors layer;
  layer.packed = batch_sizes.has_value();
  layer.batch_first = batch_first;
  layer.directions = bidirectional ? 2 : 1;
  check(nonlinearity == "tanh" || nonlinearity == "relu",
        "nonlinearity must be 'tanh' or 'relu', got '", nonlinearity, "'");
  layer.activation = nonlinearity == "tanh" ? Activation::tanh : Activation::relu;

  check(input.is_cpu(), "input must be on the CPU");
  const int32_t dtype = dtype_of(input);
  layer.single = dtype == aoti_torch_dtype_float32();
  check(layer.single || dtype == aoti_torch_dtype_float64(),
        "input must be float32 or float64 for the CPU kernel");
  check(input.dim() == (layer.packed ? 2 : 3), "input must have ", layer.packed ? 2 : 3,
        " dimensions, got ", input.dim());
  layer.input = with_adjacent_features(input);
  layer.D = input.size(input.dim() - 1);
  if (layer.packed) {
    read_batch_sizes(*batch_sizes, layer);
  } else {
    const int64_t T = input.size(batch_first ? 1 : 0);
    const int64_t B = input.size(batch_first ? 0 : 1);
    layer.steps = {T, B, T * B, nullptr, nullptr};
  }
  check(layer.steps.T > 0, "Expected sequence length to be larger than 0 in RNN");

  const size_t directions = size_t(layer.directions);
  check(weights.size() == 2 * directions || weights.size() == 4 * directions,
        "weights must hold 2 or 4 tensors for each direction, got ", weights.size());
  layer.per_direction = int64_t(weights.size() / directions);
  check(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got ", weights[1].dim());
  layer.H = weights[1].size(0);
  const int64_t H = layer.H;
  for (size_t i = 0; i < weights.size(); ++i) {
    switch (i % size_t(layer.per_direction)) {
      case 0:
        check_tensor("weight_ih", weights[i], input, {H, layer.D});
        break;
      case 1:
        check_tensor("weight_hh", weights[i], input, {H, H});
        break;
      case 2:
        check_tensor("bias_ih", weights[i], input, {H});
        break;
      default:
        check_tensor("bias_hh", weights[i], input, {H});
    }
    layer.weights.push_back(dense(weights[i]));
  }
  if (hx) {
    check_tensor("hx", *hx, input, {layer.directions, layer.steps.B, H});
    layer.hx = with_adjacent_features(*hx);
  }
  return layer;
}

// Rows of a [.., features] tensor in the caller's layout, from feature `offset` on.
template <class Scalar, class Pointer>
Rows<Scalar> rows_of(const LayerTensors& layer, const Tensor& tensor, Pointer data,
                     int64_t offset) {
  if (layer.packed) return {data + offset, 0, tensor.stride(0)};
  const int64_t time_stride = tensor.stride(layer.batch_first ? 1 : 0);
  const int64_t row_stride = tensor.stride(layer.batch_first ? 0 : 1);
  // A single sequence may have any row stride; this one keeps its rows evenly spaced.
  return {data + offset, time_stride, layer.steps.B == 1 ? time_stride : row_stride};
}

template <class Scalar>
Layer<Scalar> direction_of(const LayerTensors& tensors, int64_t direction) {
  const Tensor* w = &tensors.weights[size_t(direction * tensors.per_direction)];
  const bool bias = tensors.per_direction == 4;
  Layer<Scalar> layer;
  layer.steps = tensors.steps;
  layer.D = tensors.D;
  layer.H = tensors.H;
  layer.reverse = direction == 1;
  layer.activation = tensors.activation;
  layer.input =
      rows_of<const Scalar>(tensors, tensors.input, tensors.input.const_data_ptr<Scalar>(), 0);
  layer.hx = nullptr;
  layer.hx_stride = 0;
  if (tensors.hx) {
    layer.hx = tensors.hx->const_data_ptr<Scalar>() + direction * tensors.hx->stride(0);
    layer.hx_stride = tensors.hx->stride(1);
  }
  layer.weight_ih = w[0].const_data_ptr<Scalar>();
  layer.weight_hh = w[1].const_data_ptr<Scalar>();
  layer.bias_ih = bias ? w[2].const_data_ptr<Scalar>() : nullptr;
  layer.bias_hh = bias ? w[3].const_data_ptr<Scalar>() : nullptr;
  return layer;
}

// A new tensor of the rows of the layer, laid out like a contiguous input.
Tensor empty_rows(const LayerTensors& layer, int64_t features) {
  const Steps& steps = layer.steps;
  if (layer.packed) return empty(layer.input, {steps.N, features});
  return layer.batch_first ? empty(layer.input, {steps.B, steps.T, features})
                           : empty(layer.input, {steps.T, steps.B, features});
}

template <class Scalar>
void run_forward(const LayerTensors& tensors, const Tensor& output, const Tensor& h_n,
                 void (*kernel)(const Forward<Scalar>&, const Runtime&)) {
  for (int64_t d = 0; d < tensors.directions; ++d) {
    Call call;
    Forward<Scalar> args;
    args.layer = direction_of<Scalar>(tensors, d);
    args.output =
        rows_of<Scalar>(tensors, output, output.mutable_data_ptr<Scalar>(), d * tensors.H);
    args.h_n = h_n.mutable_data_ptr<Scalar>() + d * tensors.steps.B * tensors.H;
    kernel(args, call.runtime());
  }
}

struct BackwardTensors {
  Tensor output;
  std::optional<Tensor> grad_output;
  std::optional<Tensor> grad_h_n;
  std::optional<Tensor> grad_input;
  std::optional<Tensor> grad_hx;
  std::vector<Tensor> grad_weights;
};

template <class Scalar>
void run_backward(const LayerTensors& tensors, const BackwardTensors& grads,
                  void (*kernel)(const Backward<Scalar>&, const Runtime&)) {
  const int64_t H = tensors.H;
  for (int64_t d = 0; d < tensors.directions; ++d) {
    Call call;
    Backward<Scalar> args{};
    args.layer = direction_of<Scalar>(tensors, d);
    args.output =
        rows_of<const Scalar>(tensors, grads.output, grads.output.const_data_ptr<Scalar>(), d * H);
    if (grads.grad_output) {
      args.grad_output = rows_of<const Scalar>(tensors, *grads.grad_output,
                                               grads.grad_output->const_data_ptr<Scalar>(), d * H);
    }
    if (grads.grad_h_n) {
      args.grad_h_n = grads.grad_h_n->const_data_ptr<Scalar>() + d * grads.grad_h_n->stride(0);
      args.grad_h_n_stride = grads.grad_h_n->stride(1);
    }
    if (grads.grad_input) {
      args.grad_input = rows_of<Scalar>(tensors, *grads.grad_input,
                                        grads.grad_input->mutable_data_ptr<Scalar>(), 0);
      args.accumulate_input = d > 0;
    }
    if (grads.grad_hx) {
      args.grad_hx = grads.grad_hx->mutable_data_ptr<Scalar>() + d * tensors.steps.B * H;
    }
    if (!grads.grad_weights.empty()) {
      const Tensor* w = &grads.grad_weights[size_t(d * tensors.per_direction)];
      args.grad_weight_ih = w[0].mutable_data_ptr<Scalar>();
      args.grad_weight_hh = w[1].mutable_data_ptr<Scalar>();
      args.grad_bias = tensors.per_direction == 4 ? w[2].mutable_data_ptr<Scalar>() : nullptr;
    }
    kernel(args, call.runtime());
    if (args.grad_bias) {
      std::copy_n(
          args.grad_bias, H,
          grads.grad_weights[size_t(d * tensors.per_direction + 3)].mutable_data_ptr<Scalar>());
    }
  }
}

// ---- Operators ----

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& input, const std::optional<Tensor>& hx,
                                       const std::vector<Tensor>& weights,
                                       const std::optional<Tensor>& batch_sizes,
                                       const std::string& nonlinearity, bool bidirectional,
                                       bool batch_first) {
  const LayerTensors layer =
      check_layer(input, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first);
  Tensor output = empty_rows(layer, layer.directions * layer.H);
  Tensor h_n = empty(input, {layer.directions, layer.steps.B, layer.H});
  if (layer.steps.N > 0) {
    if (layer.single) {
      run_forward<float>(layer, output, h_n, kernels().forward_float);
    } else {
      run_forward<double>(layer, output, h_n, kernels().forward_double);
    }
  }
  return {output, h_n};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const Tensor& input, const std::optional<Tensor>& hx, const std::vector<Tensor>& weights,
    const Tensor& output, const std::optional<Tensor>& batch_sizes, const std::string& nonlinearity,
    bool bidirectional, bool batch_first, bool want_input, bool want_hx, bool want_weights) {
  const LayerTensors layer =
      check_layer(input, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first);
  const std::vector<int64_t> state_shape{layer.directions, layer.steps.B, layer.H};
  std::vector<int64_t> output_shape(input.sizes().begin(), input.sizes().end());
  output_shape.back() = layer.directions * layer.H;

  BackwardTensors grads;
  check_tensor("output", output, input, output_shape);
  grads.output = with_adjacent_features(output);
  if (grad_output) {
    check_tensor("grad_output", *grad_output, input, output_shape);
    grads.grad_output = with_adjacent_features(*grad_output);
  }
  if (grad_h_n) {
    check_tensor("grad_h_n", *grad_h_n, input, state_shape);
    grads.grad_h_n = with_adjacent_features(*grad_h_n);
  }
  if (want_input) grads.grad_input = empty_rows(layer, layer.D);
  if (want_hx) grads.grad_hx = empty(input, state_shape);
  if (want_weights) {
    for (const Tensor& w : layer.weights) {
      grads.grad_weights.push_back(
          empty(w, std::vector<int64_t>(w.sizes().begin(), w.sizes().end())));
    }
  }
  if (layer.steps.N == 0) {
    for (Tensor& w : grads.grad_weights) torch::stable::zero_(w);
  } else if (layer.single) {
    run_backward<float>(layer, grads, kernels().backward_float);
  } else {
    run_backward<double>(layer, grads, kernels().backward_double);
  }
  return {grads.grad_input ? *grads.grad_input : empty(input, {0}),
          grads.grad_hx ? *grads.grad_hx : empty(input, {0}), grads.grad_weights};
}

std::string cpu_kernel() { return kernels().name; }

}  // namespace
}  // namespace namernn_fast

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CPU, library) {
  library.impl("rnn_forward", TORCH_BOX(&namernn_fast::rnn_forward));
  library.impl("rnn_backward", TORCH_BOX(&namernn_fast::rnn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_kernel", TORCH_BOX(&namernn_fast::cpu_kernel));
}

// Importing the module loads the library, which registers the operators; it has nothing else.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
