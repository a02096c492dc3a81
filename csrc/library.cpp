// The only C++ that sees torch: checks arguments, allocates results, chooses the kernel.
// Schemas and fake kernels of these operators are in namernn_fast/ops.py.

#include <Python.h>
#include <pthread.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

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

#if defined(__x86_64__)
// The forward kernel for bfloat16 that beats the conversion to float, if this processor has one.
const KernelsFor<BFloat16>* detect_bfloat16(const std::string& wanted, const char** name) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  const bool amx = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0;  // AMX-BF16, AMX-TILE
#if defined(__linux__)
  // The kernel lends a process the tile registers when asked.
  constexpr long request_permission = 0x1023, tile_data = 18;
  const bool lent = amx && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  const bool lent = false;
#endif
  if (lent && (wanted.empty() || wanted == "amx")) {
    *name = "amx";
    return &kernels_amx;
  }
  __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx);
  const bool dot_products = (eax >> 5 & 1) != 0;
  // Intel's run at half the rate of float multiply-adds.
  if (dot_products && (wanted.empty() ? __builtin_cpu_is("amd") != 0 : wanted == "avx512_bf16")) {
    *name = "avx512_bf16";
    return &kernels_avx512_bf16;
  }
  return nullptr;
}
#endif

Kernels detect_kernels() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");  // ATen's own switch, honoured here
  const std::string wanted = variable ? variable : "";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (wanted != "default" && wanted != "avx2" && avx512) {
    Kernels found = kernels_avx512;
    if (const auto* bfloat16 = detect_bfloat16(wanted, &found.bfloat16_name)) {
      const auto backward = found.KernelsFor<BFloat16>::backward;
      static_cast<KernelsFor<BFloat16>&>(found) = *bfloat16;
      found.KernelsFor<BFloat16>::backward = backward;
    }
    return found;
  }
  if (wanted != "default" && avx2) return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels chosen = detect_kernels();
  return chosen;
}

// The size of a core's second-level cache, or a guess at it.
size_t near_cache_bytes() {
  static const size_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size_t(size);
#endif
    return size_t(1) << 20;
  }();
  return bytes;
}

// ---- What the kernels need from the process ----

// One call's scratch memory: a block kept by each thread from call to call, so that small calls
// neither allocate nor fault pages in; what a call needs beyond it is freed with the call.
class Scratch {
 public:
  static constexpr size_t kAlignment = 64;
#if defined(NAMERNN_FAST_SANITIZE)
  static constexpr size_t kKept = 0;  // pieces of one block would hide what runs over their ends
#else
  static constexpr size_t kKept = size_t(16) << 20;
#endif

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

// What one call of a kernel may use: its scratch memory, and so many threads.
class Call {
 public:
  explicit Call(const Machine& machine) : machine_(machine) { current_scratch = &scratch_; }
  ~Call() { current_scratch = nullptr; }
  Runtime runtime() const {
    return {machine_, &run_in_pool, [](size_t bytes) { return current_scratch->take(bytes); },
            [] { std::this_thread::yield(); }};
  }

 private:
  Machine machine_;
  Scratch scratch_;
};

// Whether this process was forked from one with threads, which are not in it: GCC's OpenMP would
// wait for those of its pool for ever. What one thread computes alone needs no pool.
bool pool_lost = false;

#if defined(__linux__)
[[maybe_unused]] const int fork_watched = [] {
  static bool has_threads = false;
  const auto before = [] {
    struct stat tasks;  // two links, and one for each thread
    has_threads = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != 3;
  };
  return pthread_atfork(before, nullptr, [] { pool_lost = pool_lost || has_threads; });
}();
#endif

Machine this_machine() {
  const int64_t threads = pool_lost ? 1 : int64_t(torch::stable::get_num_threads());
  return {threads, near_cache_bytes()};
}

// ---- Tensors ----

// torch's number for a dtype: cheaper to compare than its translation into a ScalarType.
int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A new contiguous tensor.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &handle);
  check(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of shape ", shape_text(sizes));
  return Tensor(handle);
}

template <class Storage>
const Storage* const_data(const Tensor& tensor) {
  return static_cast<const Storage*>(tensor.const_data_ptr());
}
template <class Storage>
Storage* mutable_data(const Tensor& tensor) {
  return static_cast<Storage*>(tensor.mutable_data_ptr());
}

// Calls f(Storage()) for the type that a dtype is stored as.
template <class F>
void with_storage(int32_t dtype, F&& f) {
  if (dtype == aoti_torch_dtype_float32()) return f(float());
  if (dtype == aoti_torch_dtype_float64()) return f(double());
  if (dtype == aoti_torch_dtype_bfloat16()) return f(BFloat16());
  if (dtype == aoti_torch_dtype_float16()) return f(Half());
  fail("input must be float32, float64, bfloat16 or float16 for the CPU kernel");
}

// Likewise, of the dtype of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty(sizes, dtype_of(like));
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
  std::optional<Tensor> prepacked;  // in their place
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  Steps steps;
  int64_t D;
  int64_t H;
  int64_t directions;
  int64_t per_direction;  // weights of one direction: 2, or 4 with biases
  int32_t dtype;
  bool packed;
  bool batch_first;
  Activation activation;
};

// The tensor that rnn_prepack makes: a head that says what it is, then each direction's weights.
struct PackedTensor {
  struct Head {
    const Kernels* kernels;  // of this process: it is not to be stored
    int64_t dtype;
    int64_t D;
    int64_t H;
    int64_t directions;
    int64_t bytes;  // of a direction
  };
  static constexpr int64_t kAlignment = 64;
  static_assert(sizeof(Head) <= kAlignment);

  static Head& head(const Tensor& tensor) { return *mutable_data<Head>(tensor); }
  static void* weights(const Tensor& tensor, int64_t direction) {
    return mutable_data<char>(tensor) + kAlignment + direction * head(tensor).bytes;
  }
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

// All of a layer but its weights.
LayerTensors check_input(const Tensor& input, const std::optional<Tensor>& hx, int64_t hidden_size,
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
  layer.dtype = dtype_of(input);
  check(input.dim() == (layer.packed ? 2 : 3), "input must have ", layer.packed ? 2 : 3,
        " dimensions, got ", input.dim());
  layer.input = with_adjacent_features(input);
  layer.D = input.size(input.dim() - 1);
  layer.H = hidden_size;
  if (layer.packed) {
    read_batch_sizes(*batch_sizes, layer);
  } else {
    const int64_t T = input.size(batch_first ? 1 : 0);
    const int64_t B = input.size(batch_first ? 0 : 1);
    layer.steps = {T, B, T * B, nullptr, nullptr};
  }
  check(layer.steps.T > 0, "Expected sequence length to be larger than 0 in RNN");
  if (hx) {
    check_tensor("hx", *hx, input, {layer.directions, layer.steps.B, layer.H});
    layer.hx = with_adjacent_features(*hx);
  }
  return layer;
}

// `like` has the dtype and the device that the weights must have.
void check_weights(LayerTensors& layer, const Tensor& like, const std::vector<Tensor>& weights) {
  layer.per_direction = int64_t(weights.size()) / layer.directions;
  const int64_t H = layer.H;
  for (size_t i = 0; i < weights.size(); ++i) {
    switch (i % size_t(layer.per_direction)) {
      case 0:
        check_tensor("weight_ih", weights[i], like, {H, layer.D});
        break;
      case 1:
        check_tensor("weight_hh", weights[i], like, {H, H});
        break;
      case 2:
        check_tensor("bias_ih", weights[i], like, {H});
        break;
      default:
        check_tensor("bias_hh", weights[i], like, {H});
    }
    layer.weights.push_back(dense(weights[i]));
  }
}

int64_t hidden_size_of(const std::vector<Tensor>& weights, bool bidirectional) {
  const size_t directions = bidirectional ? 2 : 1;
  check(weights.size() == 2 * directions || weights.size() == 4 * directions,
        "weights must hold 2 or 4 tensors for each direction, got ", weights.size());
  check(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got ", weights[1].dim());
  return weights[1].size(0);
}

LayerTensors check_layer(const Tensor& input, const std::optional<Tensor>& hx,
                         const std::vector<Tensor>& weights,
                         const std::optional<Tensor>& batch_sizes, const std::string& nonlinearity,
                         bool bidirectional, bool batch_first) {
  LayerTensors layer = check_input(input, hx, hidden_size_of(weights, bidirectional), batch_sizes,
                                   nonlinearity, bidirectional, batch_first);
  check_weights(layer, input, weights);
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
void set_weights(Layer<Scalar>& layer, const LayerTensors& tensors, int64_t direction) {
  const Tensor* w = &tensors.weights[size_t(direction * tensors.per_direction)];
  const bool bias = tensors.per_direction == 4;
  layer.weight_ih = const_data<Scalar>(w[0]);
  layer.weight_hh = const_data<Scalar>(w[1]);
  layer.bias_ih = bias ? const_data<Scalar>(w[2]) : nullptr;
  layer.bias_hh = bias ? const_data<Scalar>(w[3]) : nullptr;
}

template <class Scalar>
Layer<Scalar> direction_of(const LayerTensors& tensors, int64_t direction) {
  Layer<Scalar> layer{};
  layer.steps = tensors.steps;
  layer.D = tensors.D;
  layer.H = tensors.H;
  layer.reverse = direction == 1;
  layer.activation = tensors.activation;
  layer.input = rows_of<const Scalar>(tensors, tensors.input, const_data<Scalar>(tensors.input), 0);
  if (tensors.hx) {
    layer.hx = const_data<Scalar>(*tensors.hx) + direction * tensors.hx->stride(0);
    layer.hx_stride = tensors.hx->stride(1);
  }
  if (tensors.prepacked) {
    layer.packed = PackedTensor::weights(*tensors.prepacked, direction);
  } else {
    set_weights(layer, tensors, direction);
  }
  return layer;
}

// A new tensor of the rows of the layer, laid out like a contiguous input.
Tensor empty_rows(const LayerTensors& layer, int64_t features) {
  const Steps& steps = layer.steps;
  if (layer.packed) return empty(layer.input, {steps.N, features});
  return layer.batch_first ? empty(layer.input, {steps.B, steps.T, features})
                           : empty(layer.input, {steps.T, steps.B, features});
}

// Column panels that threads can share out.
int64_t panels_of(int64_t hidden_size) {
  const int64_t width = kernels().panel_width;
  return (hidden_size + width - 1) / width;
}

// Calls run(direction, call) for each direction: one after the other with all threads, or, where
// there is too little in one of them to share out, both at once with a thread each.
template <class Run>
void run_directions(const LayerTensors& layer, bool independent, Run&& run) {
  const Machine machine = this_machine();
  const size_t bytes = layer.dtype == aoti_torch_dtype_float64() ? sizeof(double) : sizeof(float);
  if (independent && layer.directions == 2 &&
      choose_both_at_once(layer.steps, machine, layer.D, layer.H, panels_of(layer.H), bytes)) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) run(d, Call({1, machine.near_bytes}));
    });
    return;
  }
  for (int64_t d = 0; d < layer.directions; ++d) run(d, Call(machine));
}

template <class Scalar>
void run_forward(const LayerTensors& tensors, const Tensor& output, const Tensor& h_n) {
  run_directions(tensors, true, [&](int64_t d, const Call& call) {
    Forward<Scalar> args;
    args.layer = direction_of<Scalar>(tensors, d);
    args.output = rows_of<Scalar>(tensors, output, mutable_data<Scalar>(output), d * tensors.H);
    args.h_n = mutable_data<Scalar>(h_n) + d * tensors.steps.B * tensors.H;
    kernels().KernelsFor<Scalar>::forward(args, call.runtime());
  });
}

template <class Scalar>
Tensor prepack(const LayerTensors& tensors) {
  const KernelsFor<Scalar>& own = kernels();
  const int64_t aligned = PackedTensor::kAlignment;
  const int64_t bytes =
      (int64_t(own.packed_bytes(tensors.D, tensors.H)) + aligned - 1) / aligned * aligned;
  Tensor packed = empty({aligned + tensors.directions * bytes}, aoti_torch_dtype_uint8());
  PackedTensor::head(packed) = {&kernels(), tensors.dtype,      tensors.D,
                                tensors.H,  tensors.directions, bytes};
  for (int64_t d = 0; d < tensors.directions; ++d) {
    const Call call(this_machine());
    Layer<Scalar> layer{};
    layer.D = tensors.D;
    layer.H = tensors.H;
    set_weights(layer, tensors, d);
    own.pack(layer, PackedTensor::weights(packed, d), call.runtime());
  }
  return packed;
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
void run_backward(const LayerTensors& tensors, const BackwardTensors& grads) {
  const int64_t H = tensors.H;
  // The second direction adds to the gradient of the input that the first has written.
  run_directions(tensors, !grads.grad_input, [&](int64_t d, const Call& call) {
    Backward<Scalar> args{};
    args.layer = direction_of<Scalar>(tensors, d);
    args.output =
        rows_of<const Scalar>(tensors, grads.output, const_data<Scalar>(grads.output), d * H);
    if (grads.grad_output) {
      args.grad_output = rows_of<const Scalar>(tensors, *grads.grad_output,
                                               const_data<Scalar>(*grads.grad_output), d * H);
    }
    if (grads.grad_h_n) {
      args.grad_h_n = const_data<Scalar>(*grads.grad_h_n) + d * grads.grad_h_n->stride(0);
      args.grad_h_n_stride = grads.grad_h_n->stride(1);
      args.grad_h_n_step = grads.grad_h_n->stride(2);
    }
    if (grads.grad_input) {
      args.grad_input =
          rows_of<Scalar>(tensors, *grads.grad_input, mutable_data<Scalar>(*grads.grad_input), 0);
      args.accumulate_input = d > 0;
    }
    if (grads.grad_hx) {
      args.grad_hx = mutable_data<Scalar>(*grads.grad_hx) + d * tensors.steps.B * H;
    }
    if (!grads.grad_weights.empty()) {
      const Tensor* w = &grads.grad_weights[size_t(d * tensors.per_direction)];
      args.grad_weight_ih = mutable_data<Scalar>(w[0]);
      args.grad_weight_hh = mutable_data<Scalar>(w[1]);
      args.grad_bias = tensors.per_direction == 4 ? mutable_data<Scalar>(w[2]) : nullptr;
    }
    kernels().KernelsFor<Scalar>::backward(args, call.runtime());
    if (args.grad_bias) {
      std::copy_n(args.grad_bias, H,
                  mutable_data<Scalar>(grads.grad_weights[size_t(d * tensors.per_direction + 3)]));
    }
  });
}

// ---- Operators ----

std::tuple<Tensor, Tensor> forward_layer(const LayerTensors& layer) {
  Tensor output = empty_rows(layer, layer.directions * layer.H);
  Tensor h_n = empty(layer.input, {layer.directions, layer.steps.B, layer.H});
  if (layer.steps.N > 0) {
    with_storage(layer.dtype,
                 [&](auto storage) { run_forward<decltype(storage)>(layer, output, h_n); });
  }
  return {output, h_n};
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& input, const std::optional<Tensor>& hx,
                                       const std::vector<Tensor>& weights,
                                       const std::optional<Tensor>& batch_sizes,
                                       const std::string& nonlinearity, bool bidirectional,
                                       bool batch_first) {
  return forward_layer(
      check_layer(input, hx, weights, batch_sizes, nonlinearity, bidirectional, batch_first));
}

Tensor rnn_prepack(const std::vector<Tensor>& weights, bool bidirectional) {
  LayerTensors layer;
  layer.directions = bidirectional ? 2 : 1;
  layer.H = hidden_size_of(weights, bidirectional);
  check(weights[0].is_cpu(), "weight_ih must be on the CPU");
  check(weights[0].dim() == 2, "weight_ih must have 2 dimensions, got ", weights[0].dim());
  layer.D = weights[0].size(1);
  layer.dtype = dtype_of(weights[0]);
  check_weights(layer, weights[0], weights);
  std::optional<Tensor> packed;
  with_storage(layer.dtype, [&](auto storage) { packed = prepack<decltype(storage)>(layer); });
  return *packed;
}

std::tuple<Tensor, Tensor> rnn_forward_prepacked(const Tensor& input,
                                                 const std::optional<Tensor>& hx,
                                                 const Tensor& packed, int64_t hidden_size,
                                                 const std::optional<Tensor>& batch_sizes,
                                                 const std::string& nonlinearity,
                                                 bool bidirectional, bool batch_first) {
  LayerTensors layer =
      check_input(input, hx, hidden_size, batch_sizes, nonlinearity, bidirectional, batch_first);
  check(packed.is_cpu() && packed.is_contiguous() && packed.numel() >= PackedTensor::kAlignment &&
            PackedTensor::head(packed).kernels == &kernels(),
        "packed must be what rnn_prepack made in this process");
  const PackedTensor::Head& head = PackedTensor::head(packed);
  check(head.dtype == layer.dtype, "packed must have been made of weights with the dtype of input");
  check(head.D == layer.D && head.H == layer.H && head.directions == layer.directions,
        "packed must fit input size ", layer.D, ", hidden size ", layer.H, " and ",
        layer.directions, " direction(s), got ", head.D, ", ", head.H, " and ", head.directions);
  layer.prepacked = packed;
  return forward_layer(layer);
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
    grads.grad_h_n = *grad_h_n;
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
  } else {
    with_storage(layer.dtype, [&](auto storage) { run_backward<decltype(storage)>(layer, grads); });
  }
  return {grads.grad_input ? *grads.grad_input : empty(input, {0}),
          grads.grad_hx ? *grads.grad_hx : empty(input, {0}), grads.grad_weights};
}

std::tuple<int64_t, int64_t, double> cpu_plan(const std::vector<int64_t>& batch_sizes,
                                              int64_t input_size, int64_t hidden_size,
                                              int64_t threads, int64_t near_bytes) {
  Steps steps{int64_t(batch_sizes.size()), 0, 0, batch_sizes.data(), nullptr};
  for (const int64_t size : batch_sizes) {
    steps.B = std::max(steps.B, size);
    steps.N += size;
  }
  const Plan plan = choose_plan(steps, {threads, size_t(near_bytes)}, input_size, hidden_size,
                                panels_of(hidden_size), sizeof(float));
  return {plan.groups, plan.members, plan.time};
}

std::string cpu_kernel(bool bfloat16) {
  return bfloat16 ? kernels().bfloat16_name : kernels().name;
}

}  // namespace
}  // namespace namernn_fast

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CPU, library) {
  library.impl("rnn_forward", TORCH_BOX(&namernn_fast::rnn_forward));
  library.impl("rnn_backward", TORCH_BOX(&namernn_fast::rnn_backward));
  library.impl("rnn_prepack", TORCH_BOX(&namernn_fast::rnn_prepack));
  library.impl("rnn_forward_prepacked", TORCH_BOX(&namernn_fast::rnn_forward_prepacked));
}

STABLE_TORCH_LIBRARY_IMPL(namernn_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_kernel", TORCH_BOX(&namernn_fast::cpu_kernel));
  library.impl("cpu_plan", TORCH_BOX(&namernn_fast::cpu_plan));
}

// Importing the module loads the library, which registers the operators; it has nothing else.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
