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
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "kernel.h"
#include "team-inl.h"

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

// ---- Options: the bits of an operator's argument of that name, as ops.py has them ----

struct Options {
  bool relu;
  bool bias;
  bool bidirectional;
  bool batch_first;
  bool packed;
  bool jagged;
  bool batch_invariant;
  bool want_hidden;
};

Options read_options(int64_t bits) {
  check(bits >> 8 == 0, "options must have 8 bits at most, got ", bits);
  const auto has = [&](int place) { return (bits >> place & 1) != 0; };
  return {has(0), has(1), has(2), has(3), has(4), has(5), has(6), has(7)};
}

// ---- The processor ----

#if defined(__x86_64__)
// The kernels for bfloat16 that beat the conversion to float, if this processor has them.
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
      static_cast<KernelsFor<BFloat16>&>(found) = *bfloat16;
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

Machine one_thread() { return {1, near_cache_bytes()}; }

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
  if (error != AOTI_TORCH_SUCCESS) fail("no memory for a tensor of shape ", shape_text(sizes));
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

// ---- The batch: which rows exist and where they lie ----

struct Batch {
  enum class Layout { padded, packed, jagged };

  int64_t T;  // of the caller's tensors, padding included
  int64_t B;
  Layout layout;
  bool batch_first;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  std::vector<int64_t> order;  // [B], those without rows last
  std::vector<int64_t> origin;
  std::unique_ptr<bool[]> resets_in_order;
  Resets resets;
  Steps steps;  // of the sequences that have rows
};

// Sequences alive at each time, from the tensor of a PackedSequence.
void read_batch_sizes(const Tensor& batch_sizes, int64_t data_rows, Batch& batch) {
  check(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long &&
            batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU");
  const Tensor contiguous = dense(batch_sizes);
  const int64_t T = contiguous.numel();
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  batch.count.assign(values, values + T);
  batch.start.resize(T);
  int64_t rows = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t limit = t ? batch.count[t - 1] : data_rows;
    check(batch.count[t] >= 1, "batch_sizes must be positive, got ", batch.count[t], " at step ",
          t);
    check(batch.count[t] <= limit,
          t ? "batch_sizes must not increase, got "
            : "batch_sizes must not exceed the rows of data, got ",
          batch.count[t], " after ", limit, " at step ", t);
    batch.start[t] = rows;
    rows += batch.count[t];
  }
  check(rows == data_rows, "batch_sizes must sum to the rows of data, ", data_rows,
        ", got a sum of ", rows);
  batch.T = T;
  batch.B = T ? batch.count[0] : 0;
  batch.steps = {T, batch.B, rows, batch.count.data(), batch.start.data(), nullptr, nullptr};
}

// The same from B lengths from 0 to T, in any order.
void sort_sequences(const int64_t* values, Batch& batch) {
  std::vector<int64_t> of_length(batch.T + 1, 0);  // how many sequences
  bool sorted = true;
  int64_t rows = 0;
  for (int64_t b = 0; b < batch.B; ++b) {
    const int64_t length = values[b];
    ++of_length[length];
    rows += length;
    sorted = sorted && (b == 0 || length <= values[b - 1]);
  }
  // Longest first; those of one length stay as they were.
  int64_t T = batch.T;
  while (T > 0 && of_length[T] == 0) --T;
  batch.count.resize(T);
  int64_t longer = 0;
  for (int64_t length = T; length > 0; --length) {
    longer += of_length[length];
    batch.count[length - 1] = longer;
  }
  if (!sorted) {
    batch.order.resize(batch.B);
    std::vector<int64_t>& place = of_length;
    place[0] = longer;
    for (int64_t length = 1; length <= T; ++length) {
      place[length] = length < T ? batch.count[length] : 0;
    }
    for (int64_t b = 0; b < batch.B; ++b) batch.order[place[values[b]]++] = b;
  }
  batch.steps = {
      T, longer, rows, batch.count.data(), nullptr, sorted ? nullptr : batch.order.data(), nullptr};
  if (rows == T * longer) batch.steps.count = nullptr;  // all of one length, but for empty ones
}

void read_lengths(const Tensor& lengths, Batch& batch) {
  check(lengths.is_cpu() && lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1,
        "lengths must be a 1-D int64 tensor on the CPU");
  check(lengths.numel() == batch.B, "lengths must have one length for each of the ", batch.B,
        " sequences, got ", lengths.numel());
  const Tensor contiguous = dense(lengths);
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch.B; ++b) {
    check(values[b] >= 0 && values[b] <= batch.T, "lengths must be from 0 to ", batch.T,
          ", the steps of input, got ", values[b], " for sequence ", b);
  }
  sort_sequences(values, batch);
  batch.origin = batch.order;
}

// Sequences one after the other, the b-th in rows offsets[b] .. offsets[b + 1].
void read_offsets(const Tensor& offsets, int64_t data_rows, Batch& batch) {
  check(offsets.is_cpu() && offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 &&
            offsets.numel() > 0,
        "offsets must be a 1-D int64 tensor on the CPU, of one element at least");
  const Tensor contiguous = dense(offsets);
  const int64_t* values = contiguous.const_data_ptr<int64_t>();
  batch.B = contiguous.numel() - 1;
  check(values[0] == 0 && values[batch.B] == data_rows, "offsets must begin with 0 and end with ",
        data_rows, ", the rows of data, got ", values[0], " and ", values[batch.B]);
  std::vector<int64_t> lengths(size_t(batch.B));
  for (int64_t b = 0; b < batch.B; ++b) {
    lengths[size_t(b)] = values[b + 1] - values[b];
    check(lengths[size_t(b)] >= 0, "offsets must not decrease, got ", values[b + 1], " after ",
          values[b], " at ", b + 1);
    batch.T = std::max(batch.T, lengths[size_t(b)]);
  }
  sort_sequences(lengths.data(), batch);
  batch.origin.resize(size_t(batch.steps.B));
  for (int64_t i = 0; i < batch.steps.B; ++i) {
    batch.origin[size_t(i)] = values[batch.order.empty() ? i : batch.order[size_t(i)]];
  }
}

// The caller's mask (T, B), (B, T) where the batch comes first, in the order of the sequences.
void read_resets(const Tensor& reset, Batch& batch) {
  check(reset.is_cpu() && reset.scalar_type() == ScalarType::Bool,
        "reset must be a bool tensor on the CPU");
  const std::vector<int64_t> shape =
      batch.batch_first ? std::vector{batch.B, batch.T} : std::vector{batch.T, batch.B};
  const auto got = reset.sizes();
  if (got.size() != 2 || !std::equal(shape.begin(), shape.end(), got.begin())) {
    fail("reset must have shape ", shape_text(shape), ", got ", shape_text(got));
  }
  const bool* at = static_cast<const bool*>(reset.const_data_ptr());
  const int64_t time_stride = reset.stride(batch.batch_first ? 1 : 0);
  const int64_t stride = reset.stride(batch.batch_first ? 0 : 1);
  const Steps& steps = batch.steps;
  batch.resets_in_order.reset(new bool[size_t(std::max<int64_t>(1, steps.T * steps.B))]);
  bool any = false;
  for (int64_t t = 0; t < steps.T; ++t) {
    for (int64_t b = 0; b < steps.B; ++b) {
      const bool cut = at[t * time_stride + (steps.order ? steps.order[b] : b) * stride];
      batch.resets_in_order[size_t(t * steps.B + b)] = cut;
      any = any || cut;
    }
  }
  if (any) batch.resets = {batch.resets_in_order.get(), steps.B};
}

// `rows` is of the kind that the options say: batch_sizes, offsets or lengths; or there is none.
Batch read_batch(const Tensor& input, const std::optional<Tensor>& rows,
                 const std::optional<Tensor>& reset, const Options& options) {
  check(!(options.packed && options.jagged), "options must not say both packed and jagged");
  Batch batch{};
  batch.layout = options.packed   ? Batch::Layout::packed
                 : options.jagged ? Batch::Layout::jagged
                                  : Batch::Layout::padded;
  batch.batch_first = options.batch_first;
  const int64_t dimensions = batch.layout == Batch::Layout::padded ? 3 : 2;
  check(input.dim() == dimensions, "input must have ", dimensions, " dimensions, got ",
        input.dim());
  if (batch.layout != Batch::Layout::padded) {
    check(rows.has_value(), "rows must be the ", options.packed ? "batch_sizes" : "offsets",
          " of input, got none");
    if (options.packed) {
      read_batch_sizes(*rows, input.size(0), batch);
    } else {
      read_offsets(*rows, input.size(0), batch);
    }
  } else {
    batch.T = input.size(options.batch_first ? 1 : 0);
    batch.B = input.size(options.batch_first ? 0 : 1);
    batch.steps = {batch.T, batch.B, batch.T * batch.B, nullptr, nullptr, nullptr, nullptr};
  }
  check(batch.T > 0 || options.jagged, "Expected sequence length to be larger than 0 in RNN");
  if (rows && batch.layout == Batch::Layout::padded) read_lengths(*rows, batch);
  if (!batch.origin.empty()) batch.steps.origin = batch.origin.data();
  if (reset) read_resets(*reset, batch);
  return batch;
}

// Rows of a [.., features] tensor in the caller's layout, from feature `offset` on.
template <class Scalar, class Pointer>
Rows<Scalar> rows_of(const Batch& batch, const Tensor& tensor, Pointer data, int64_t offset) {
  if (batch.layout == Batch::Layout::packed) return {data + offset, 0, tensor.stride(0)};
  if (batch.layout == Batch::Layout::jagged) {
    return {data + offset, tensor.stride(0), tensor.stride(0)};
  }
  const int64_t time_stride = tensor.stride(batch.batch_first ? 1 : 0);
  const int64_t row_stride = tensor.stride(batch.batch_first ? 0 : 1);
  // A single sequence may have any row stride; this one keeps its rows evenly spaced.
  return {data + offset, time_stride, batch.B == 1 ? time_stride : row_stride};
}

// A new tensor of the batch's rows, laid out like a contiguous input.
Tensor empty_rows(const Batch& batch, int64_t features, int32_t dtype) {
  if (batch.layout != Batch::Layout::padded) return empty({batch.steps.N, features}, dtype);
  return batch.batch_first ? empty({batch.B, batch.T, features}, dtype)
                           : empty({batch.T, batch.B, features}, dtype);
}

// Zeroes the rows past the end of each sequence, in a new tensor of these rows.
void clear_padding(const Batch& batch, const Tensor& tensor) {
  if (batch.layout != Batch::Layout::padded || batch.steps.N == batch.T * batch.B) return;
  size_t element = sizeof(float);
  with_storage(dtype_of(tensor), [&](auto storage) { element = sizeof(storage); });
  const Rows<char> rows = rows_of<char>(batch, tensor, mutable_data<char>(tensor), 0);
  const size_t bytes = size_t(tensor.size(2)) * element;
  const Steps& steps = batch.steps;
  constexpr int64_t worth_a_thread = int64_t(1) << 19;  // bytes
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / (batch.B * int64_t(bytes) + 1));
  const auto clear = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t alive = t >= steps.T ? 0 : steps.count ? steps.count[t] : steps.B;
      for (int64_t b = alive; b < batch.B; ++b) {
        const int64_t place = batch.order.empty() ? b : batch.order[size_t(b)];
        const int64_t row = t * rows.time_stride + place * rows.row_stride;
        std::memset(rows.data + row * int64_t(element), 0, bytes);
      }
    }
  };
  if (this_machine().threads == 1) return clear(0, batch.T);
  torch::stable::parallel_for(0, batch.T, grain, clear);
}

// ---- The stack: its checked arguments, layer by layer and direction by direction ----

struct Stack {
  Batch batch;
  Tensor input;
  std::optional<Tensor> hx;
  std::vector<Tensor> weights;
  std::vector<Tensor> prepacked;  // in their place, one of each layer
  int64_t layers;
  int64_t directions;
  int64_t per_direction;  // weights of one direction: 2, or 4 with biases
  int64_t D;              // features of input; those of later layers are directions * H
  int64_t H;
  int32_t dtype;
  Activation activation;
  bool batch_invariant;
};

int64_t input_size(const Stack& stack, int64_t layer) {
  return layer ? stack.directions * stack.H : stack.D;
}

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

// All of a stack but its weights.
Stack check_input(const Tensor& input, const std::optional<Tensor>& hx, int64_t layers,
                  int64_t hidden_size, Batch batch, const Options& options) {
  Stack stack{std::move(batch), with_adjacent_features(input)};
  stack.layers = layers;
  stack.directions = options.bidirectional ? 2 : 1;
  stack.batch_invariant = options.batch_invariant;
  stack.per_direction = options.bias ? 4 : 2;
  stack.activation = options.relu ? Activation::relu : Activation::tanh;
  check(input.is_cpu(), "input must be on the CPU");
  stack.dtype = dtype_of(input);
  stack.D = input.size(input.dim() - 1);
  stack.H = hidden_size;
  if (hx) {
    check_tensor("hx", *hx, input, {layers * stack.directions, stack.batch.B, stack.H});
    stack.hx = with_adjacent_features(*hx);
  }
  return stack;
}

// `like` has the dtype and the device that the weights must have.
void check_weights(Stack& stack, const Tensor& like, const std::vector<Tensor>& weights) {
  const int64_t H = stack.H;
  const int64_t per_layer = stack.directions * stack.per_direction;
  stack.weights.reserve(weights.size());
  for (int64_t i = 0; i < int64_t(weights.size()); ++i) {
    const Tensor& weight = weights[size_t(i)];
    switch (i % stack.per_direction) {
      case 0:
        check_tensor("weight_ih", weight, like, {H, input_size(stack, i / per_layer)});
        break;
      case 1:
        check_tensor("weight_hh", weight, like, {H, H});
        break;
      case 2:
        check_tensor("bias_ih", weight, like, {H});
        break;
      default:
        check_tensor("bias_hh", weight, like, {H});
    }
    stack.weights.push_back(dense(weight));
  }
}

// How many layers these weights are of.
int64_t check_count(const std::vector<Tensor>& weights, int64_t per_layer) {
  const int64_t count = int64_t(weights.size());
  check(count > 0 && count % per_layer == 0, "weights must hold ", per_layer,
        " tensors for each layer, got ", count);
  return count / per_layer;
}

Stack check_stack(const Tensor& input, const std::optional<Tensor>& hx,
                  const std::vector<Tensor>& weights, Batch batch, const Options& options) {
  const int64_t per_layer = (options.bidirectional ? 2 : 1) * (options.bias ? 4 : 2);
  const int64_t layers = check_count(weights, per_layer);
  check(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got ", weights[1].dim());
  Stack stack = check_input(input, hx, layers, weights[1].size(0), std::move(batch), options);
  check_weights(stack, input, weights);
  return stack;
}

template <class Scalar>
void set_weights(Layer<Scalar>& layer, const Stack& stack, int64_t state) {
  const Tensor* w = &stack.weights[size_t(state * stack.per_direction)];
  const bool bias = stack.per_direction == 4;
  layer.weight_ih = const_data<Scalar>(w[0]);
  layer.weight_hh = const_data<Scalar>(w[1]);
  layer.bias_ih = bias ? const_data<Scalar>(w[2]) : nullptr;
  layer.bias_hh = bias ? const_data<Scalar>(w[3]) : nullptr;
}

// Direction d of layer k, which reads `input`.
template <class Scalar>
Layer<Scalar> direction_of(const Stack& stack, int64_t k, int64_t d, const Tensor& input) {
  const int64_t state = k * stack.directions + d;
  Layer<Scalar> layer{};
  layer.steps = stack.batch.steps;
  layer.D = input_size(stack, k);
  layer.H = stack.H;
  layer.reverse = d == 1;
  layer.activation = stack.activation;
  layer.resets = stack.batch.resets;
  layer.batch_invariant = stack.batch_invariant;
  if (!stack.batch_invariant) layer.chains = choose_chains(stack.batch.steps, stack.H);
  layer.input = rows_of<const Scalar>(stack.batch, input, const_data<Scalar>(input), 0);
  if (stack.hx) {
    layer.hx = const_data<Scalar>(*stack.hx) + state * stack.hx->stride(0);
    layer.hx_stride = stack.hx->stride(1);
  }
  if (!stack.prepacked.empty()) {
    layer.packed = PackedTensor::weights(stack.prepacked[size_t(k)], d);
  } else {
    set_weights(layer, stack, state);
  }
  return layer;
}

// Column panels that threads can share out.
int64_t panels_of(int64_t hidden_size) {
  const int64_t width = kernels().panel_width;
  return (hidden_size + width - 1) / width;
}

size_t computed_bytes(const Stack& stack) {
  return stack.dtype == aoti_torch_dtype_float64() ? sizeof(double) : sizeof(float);
}

// Calls run(direction, call) for each direction: one after the other with all threads, or, where
// there is too little in one of them to share out, both at once with a thread each.
template <class Run>
void run_directions(const Stack& stack, int64_t D, bool independent, Run&& run) {
  const Machine machine = this_machine();
  if (independent && stack.directions == 2 &&
      choose_both_at_once(stack.batch.steps, machine, D, stack.H, panels_of(stack.H),
                          computed_bytes(stack))) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) run(d, Call(one_thread()));
    });
    return;
  }
  for (int64_t d = 0; d < stack.directions; ++d) run(d, Call(machine));
}

// ---- Consecutive layers at once ----

// The times of a batch in stretches that run one by one.
class Stretches {
 public:
  Stretches(const Steps& steps, int64_t length) : steps_(steps), length_(length) {
    if (!steps.start) return;
    start_.resize(size_t(steps.T));
    for (int64_t t = 0; t < steps.T; ++t) {
      start_[size_t(t)] = steps.start[t] - steps.start[t / length * length];
    }
  }

  int64_t count() const { return (steps_.T + length_ - 1) / length_; }

  // The i-th stretch of a layer that runs forward, as a layer of its own.
  template <class Scalar>
  void select(int64_t i, Layer<Scalar>& layer, const Rows<const Scalar>& output) const {
    const int64_t first = i * length_;
    if (first > 0) {
      layer.hx = row(output, first - 1).data;
      layer.hx_stride = output.row_stride;
    }
    layer.input = row(layer.input, first);
    if (layer.resets.at) layer.resets.at += first * layer.resets.time_stride;
    Steps& steps = layer.steps;
    steps.T = std::min(length_, steps_.T - first);
    if (steps_.count) {
      steps.B = steps_.count[first];
      steps.count = steps_.count + first;
      steps.N = std::accumulate(steps.count, steps.count + steps.T, int64_t(0));
    } else {
      steps.N = steps.T * steps.B;
    }
    if (steps_.start) steps.start = start_.data() + first;
  }

  // Rows from time t on.
  template <class Scalar>
  Rows<Scalar> row(Rows<Scalar> rows, int64_t t) const {
    if (rows.data) {
      rows.data += steps_.start ? steps_.start[t] * rows.row_stride : t * rows.time_stride;
    }
    return rows;
  }
  template <class Scalar>
  Rows<Scalar> from(int64_t i, const Rows<Scalar>& rows) const {
    return row(rows, i * length_);
  }

 private:
  Steps steps_;
  int64_t length_;
  std::vector<int64_t> start_;  // rows before a time, from its stretch's first on
};

// Calls body(n, i) for every stretch i of every layer n, those of a layer in turn and each after
// the same stretch of the layer before. A thread takes the next layer that nobody has; the one
// before is done or has a thread, so nobody waits for ever.
template <class Body>
void run_wave(int64_t at_once, int64_t layers, int64_t stretches, Body&& body) {
  struct alignas(64) Progress {
    std::atomic<int64_t> done{0};
  };
  std::vector<Progress> progress(static_cast<size_t>(layers));
  std::atomic<int64_t> next{0};
  const Runtime runtime = Call(one_thread()).runtime();
  torch::stable::parallel_for(0, at_once, 1, [&](int64_t, int64_t) {
    for (int64_t n; (n = next++) < layers;) {
      std::atomic<int64_t>& done = progress[size_t(n)].done;
      try {
        for (int64_t i = 0; i < stretches; ++i) {
          if (n > 0) {
            wait_until(runtime, -1, [&] {
              return progress[size_t(n - 1)].done.load(std::memory_order_acquire) > i;
            });
          }
          body(n, i);
          done.store(i + 1, std::memory_order_release);
        }
      } catch (...) {
        done.store(stretches, std::memory_order_release);
        throw;
      }
    }
  });
}

Wave wave_of(const Stack& stack, Pass pass) {
  const bool one_way = stack.directions == 1;
  // A stretch begins with states that lie where rows do, and finds them like those of hx.
  const bool alike = stack.batch.layout != Batch::Layout::jagged;
  const bool whole = stack.dtype == aoti_torch_dtype_float32() ||
                     stack.dtype == aoti_torch_dtype_float64();  // 16 bits would round the state
  if (!one_way || !alike || !whole || stack.layers == 1) return {1, stack.batch.steps.T};
  return choose_wave(stack.batch.steps, this_machine(), stack.H, panels_of(stack.H),
                     computed_bytes(stack), stack.layers, pass);
}

template <class Scalar>
Tensor packed_for(const Packing<Scalar>& packing, const Layer<Scalar>& layer) {
  const Tensor packed = empty({int64_t(packing.bytes(layer.D, layer.H))}, aoti_torch_dtype_uint8());
  packing.pack(layer, mutable_data<char>(packed), Call(one_thread()).runtime());
  return packed;
}

// Calls f(state, sequence) for the sequences without a row in every layer and direction.
template <class F>
void for_each_idle_state(const Stack& stack, F&& f) {
  const Batch& batch = stack.batch;
  for (int64_t i = batch.steps.B; i < batch.B; ++i) {
    const int64_t b = batch.order.empty() ? i : batch.order[size_t(i)];
    for (int64_t state = 0; state < stack.layers * stack.directions; ++state) f(state, b);
  }
}

// ---- Forward ----

struct ForwardTensors {
  Tensor h_n;
  std::vector<std::optional<Tensor>> outputs;  // of each layer; of those not kept, none
};

template <class Scalar>
Forward<Scalar> forward_of(const Stack& stack, const ForwardTensors& results, int64_t k,
                           int64_t d) {
  const Tensor& output = *results.outputs[size_t(k)];
  Forward<Scalar> args;
  args.layer = direction_of<Scalar>(stack, k, d, k ? *results.outputs[size_t(k - 1)] : stack.input);
  args.output = rows_of<Scalar>(stack.batch, output, mutable_data<Scalar>(output), d * stack.H);
  args.h_n =
      mutable_data<Scalar>(results.h_n) + (k * stack.directions + d) * stack.batch.B * stack.H;
  return args;
}

template <class Scalar>
void run_forward_wave(const Stack& stack, const Wave& wave, ForwardTensors& results) {
  const KernelsFor<Scalar>& own = kernels();
  const Stretches stretches(stack.batch.steps, wave.steps);
  for (auto& output : results.outputs) output = empty_rows(stack.batch, stack.H, stack.dtype);
  std::vector<std::optional<Tensor>> packed(size_t(stack.layers));
  run_wave(wave.layers, stack.layers, stretches.count(), [&](int64_t k, int64_t i) {
    Forward<Scalar> args = forward_of<Scalar>(stack, results, k, 0);
    if (!args.layer.packed) {
      std::optional<Tensor>& own_packed = packed[size_t(k)];
      if (!own_packed) own_packed = packed_for(own.forward_packing, args.layer);
      args.layer.packed = mutable_data<char>(*own_packed);
    }
    stretches.select(i, args.layer,
                     {args.output.data, args.output.time_stride, args.output.row_stride});
    args.output = stretches.from(i, args.output);
    own.forward(args, Call(one_thread()).runtime());
  });
}

template <class Scalar>
void run_forward(const Stack& stack, ForwardTensors& results, bool want_hidden) {
  if constexpr (std::is_floating_point_v<Scalar>) {
    const Wave wave = wave_of(stack, Pass::forward);
    if (wave.layers > 1) return run_forward_wave<Scalar>(stack, wave, results);
  }
  for (int64_t k = 0; k < stack.layers; ++k) {
    results.outputs[size_t(k)] = empty_rows(stack.batch, stack.directions * stack.H, stack.dtype);
    if (stack.batch.steps.N > 0) {
      run_directions(stack, input_size(stack, k), true, [&](int64_t d, const Call& call) {
        kernels().KernelsFor<Scalar>::forward(forward_of<Scalar>(stack, results, k, d),
                                              call.runtime());
      });
    }
    if (k > 0 && !want_hidden) results.outputs[size_t(k - 1)].reset();
  }
}

// What no kernel writes: padding, and the states of sequences without rows.
template <class Scalar>
void finish_forward(const Stack& stack, const ForwardTensors& results, bool want_hidden) {
  const int64_t H = stack.H;
  for (size_t k = want_hidden ? 0 : results.outputs.size() - 1; k < results.outputs.size(); ++k) {
    clear_padding(stack.batch, *results.outputs[k]);
  }
  for_each_idle_state(stack, [&](int64_t state, int64_t b) {
    Scalar* h = mutable_data<Scalar>(results.h_n) + (state * stack.batch.B + b) * H;
    if (stack.hx) {
      std::copy_n(
          const_data<Scalar>(*stack.hx) + state * stack.hx->stride(0) + b * stack.hx->stride(1), H,
          h);
    } else {
      std::fill_n(h, H, Scalar());
    }
  });
}

ForwardTensors forward_stack(const Stack& stack, bool want_hidden) {
  ForwardTensors results{
      empty({stack.layers * stack.directions, stack.batch.B, stack.H}, stack.dtype),
      std::vector<std::optional<Tensor>>(size_t(stack.layers))};
  with_storage(stack.dtype, [&](auto storage) {
    run_forward<decltype(storage)>(stack, results, want_hidden);
    finish_forward<decltype(storage)>(stack, results, want_hidden);
  });
  return results;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_forward(
    const Tensor& input, const std::optional<Tensor>& hx, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& rows, const std::optional<Tensor>& reset, int64_t bits) {
  const Options options = read_options(bits);
  const Stack stack =
      check_stack(input, hx, weights, read_batch(input, rows, reset, options), options);
  const ForwardTensors results = forward_stack(stack, options.want_hidden);
  std::vector<Tensor> hidden;
  for (int64_t k = 0; options.want_hidden && k + 1 < stack.layers; ++k) {
    hidden.push_back(*results.outputs[size_t(k)]);
  }
  return {*results.outputs.back(), results.h_n, hidden};
}

template <class Scalar>
Tensor prepack(const Stack& stack) {
  const Packing<Scalar>& packing = kernels().KernelsFor<Scalar>::forward_packing;
  const int64_t aligned = PackedTensor::kAlignment;
  const int64_t bytes =
      (int64_t(packing.bytes(stack.D, stack.H)) + aligned - 1) / aligned * aligned;
  Tensor packed = empty({aligned + stack.directions * bytes}, aoti_torch_dtype_uint8());
  PackedTensor::head(packed) = {&kernels(), stack.dtype, stack.D, stack.H, stack.directions, bytes};
  for (int64_t d = 0; d < stack.directions; ++d) {
    const Call call(this_machine());
    Layer<Scalar> layer{};
    layer.D = stack.D;
    layer.H = stack.H;
    set_weights(layer, stack, d);
    packing.pack(layer, PackedTensor::weights(packed, d), call.runtime());
  }
  return packed;
}

// Of one layer.
Tensor rnn_prepack(const std::vector<Tensor>& weights, int64_t bits) {
  const Options options = read_options(bits);
  Stack stack{};
  stack.layers = 1;
  stack.directions = options.bidirectional ? 2 : 1;
  stack.per_direction = options.bias ? 4 : 2;
  check_count(weights, stack.directions * stack.per_direction);
  check(weights[0].is_cpu(), "weight_ih must be on the CPU");
  check(weights[0].dim() == 2, "weight_ih must have 2 dimensions, got ", weights[0].dim());
  stack.D = weights[0].size(1);
  stack.H = weights[0].size(0);
  stack.dtype = dtype_of(weights[0]);
  check_weights(stack, weights[0], weights);
  std::optional<Tensor> packed;
  with_storage(stack.dtype, [&](auto storage) { packed = prepack<decltype(storage)>(stack); });
  return *packed;
}

std::tuple<Tensor, Tensor> rnn_forward_prepacked(const Tensor& input,
                                                 const std::optional<Tensor>& hx,
                                                 const std::vector<Tensor>& packed,
                                                 int64_t hidden_size,
                                                 const std::optional<Tensor>& rows,
                                                 const std::optional<Tensor>& reset, int64_t bits) {
  const Options options = read_options(bits);
  check(!packed.empty(), "packed must hold a tensor for each layer, got none");
  Stack stack = check_input(input, hx, int64_t(packed.size()), hidden_size,
                            read_batch(input, rows, reset, options), options);
  for (int64_t k = 0; k < stack.layers; ++k) {
    const Tensor& of_layer = packed[size_t(k)];
    check(of_layer.is_cpu() && of_layer.is_contiguous() &&
              of_layer.numel() >= PackedTensor::kAlignment &&
              PackedTensor::head(of_layer).kernels == &kernels(),
          "packed must be what rnn_prepack made in this process");
    const PackedTensor::Head& head = PackedTensor::head(of_layer);
    check(head.dtype == stack.dtype,
          "packed must have been made of weights with the dtype of input");
    const int64_t D = input_size(stack, k);
    check(head.D == D && head.H == stack.H && head.directions == stack.directions,
          "packed must fit input size ", D, ", hidden size ", stack.H, " and ", stack.directions,
          " direction(s), got ", head.D, ", ", head.H, " and ", head.directions);
  }
  stack.prepacked = packed;
  const ForwardTensors results = forward_stack(stack, false);
  return {*results.outputs.back(), results.h_n};
}

// ---- Backward ----

struct BackwardTensors {
  std::vector<Tensor> outputs;  // of each layer, from the forward pass
  std::optional<Tensor> grad_output;
  std::optional<Tensor> grad_h_n;
  std::optional<Tensor> grad_input;
  std::optional<Tensor> grad_hx;
  std::vector<Tensor> grad_weights;  // one by one as in Stack; of layers not wanted, empty ones
  std::vector<bool> want_weights;    // of each layer
};

// Direction d of layer k, given the gradient of its output; that of its input goes to `grad_input`,
// to which the second direction adds.
template <class Scalar>
Backward<Scalar> backward_of(const Stack& stack, const BackwardTensors& grads, int64_t k, int64_t d,
                             const std::optional<Tensor>& grad_output,
                             const std::optional<Tensor>& grad_input) {
  const Batch& batch = stack.batch;
  const int64_t H = stack.H;
  const int64_t state = k * stack.directions + d;
  const Tensor& output = grads.outputs[size_t(k)];
  Backward<Scalar> args{};
  args.layer = direction_of<Scalar>(stack, k, d, k ? grads.outputs[size_t(k - 1)] : stack.input);
  args.output = rows_of<const Scalar>(batch, output, const_data<Scalar>(output), d * H);
  if (grad_output) {
    args.grad_output =
        rows_of<const Scalar>(batch, *grad_output, const_data<Scalar>(*grad_output), d * H);
  }
  if (grads.grad_h_n) {
    args.grad_h_n = const_data<Scalar>(*grads.grad_h_n) + state * grads.grad_h_n->stride(0);
    args.grad_h_n_stride = grads.grad_h_n->stride(1);
    args.grad_h_n_step = grads.grad_h_n->stride(2);
  }
  if (grad_input) {
    args.grad_input = rows_of<Scalar>(batch, *grad_input, mutable_data<Scalar>(*grad_input), 0);
    args.accumulate_input = d > 0;
  }
  if (grads.grad_hx) {
    args.grad_hx = mutable_data<Scalar>(*grads.grad_hx) + state * batch.B * H;
  }
  if (grads.want_weights[size_t(k)]) {
    const Tensor* w = &grads.grad_weights[size_t(state * stack.per_direction)];
    args.grad_weight_ih = mutable_data<Scalar>(w[0]);
    args.grad_weight_hh = mutable_data<Scalar>(w[1]);
    args.grad_bias = stack.per_direction == 4 ? mutable_data<Scalar>(w[2]) : nullptr;
  }
  return args;
}

// Layers below the lowest of which a gradient is wanted have nothing to do.
int64_t lowest_layer(const Stack& stack, const BackwardTensors& grads) {
  if (grads.grad_input || grads.grad_hx) return 0;
  return std::find(grads.want_weights.begin(), grads.want_weights.end(), true) -
         grads.want_weights.begin();
}

// The gradient of a layer's state travels from stretch to stretch in grad_hx.
template <class Scalar>
void run_backward_wave(const Stack& stack, const Wave& wave, const BackwardTensors& grads) {
  const KernelsFor<Scalar>& own = kernels();
  const int64_t lowest = lowest_layer(stack, grads);
  const int64_t layers = stack.layers - lowest;
  const int64_t size = stack.batch.B * stack.H;
  const Stretches stretches(stack.batch.steps, wave.steps);
  std::vector<std::optional<Tensor>> grad_rows(size_t(stack.layers + 1));  // of layers' inputs
  grad_rows[size_t(stack.layers)] = grads.grad_output;
  for (int64_t k = stack.layers; --k > lowest;) {
    grad_rows[size_t(k)] = empty_rows(stack.batch, stack.H, stack.dtype);
  }
  grad_rows[size_t(lowest)] = grads.grad_input;
  std::vector<std::optional<Tensor>> grad_states(size_t(stack.layers)),
      packed(size_t(stack.layers));
  run_wave(std::min(wave.layers, layers), layers, stretches.count(), [&](int64_t n, int64_t i) {
    const int64_t k = stack.layers - 1 - n;
    Backward<Scalar> args =
        backward_of<Scalar>(stack, grads, k, 0, grad_rows[size_t(k + 1)], grad_rows[size_t(k)]);
    std::optional<Tensor>& own_packed = packed[size_t(k)];
    if (i == 0) {
      own_packed = packed_for(own.backward_packing, args.layer);
      if (!args.grad_hx) grad_states[size_t(k)] = empty({size}, stack.dtype);
    }
    args.layer.packed = mutable_data<char>(*own_packed);
    if (!args.grad_hx) args.grad_hx = mutable_data<Scalar>(*grad_states[size_t(k)]);
    if (i == 0) {  // of sequences that end in other stretches, too
      for (int64_t b = 0; b < stack.batch.B; ++b) {
        for (int64_t j = 0; j < stack.H; ++j) {
          args.grad_hx[b * stack.H + j] =
              args.grad_h_n ? args.grad_h_n[b * args.grad_h_n_stride + j * args.grad_h_n_step]
                            : Scalar(0);
        }
      }
    }
    args.grad_h_n = args.grad_hx;
    args.grad_h_n_stride = stack.H;
    args.grad_h_n_step = 1;
    args.accumulate_weights = i > 0;
    const int64_t stretch = stretches.count() - 1 - i;
    stretches.select(stretch, args.layer, args.output);
    args.output = stretches.from(stretch, args.output);
    args.grad_output = stretches.from(stretch, args.grad_output);
    args.grad_input = stretches.from(stretch, args.grad_input);
    own.backward(args, Call(one_thread()).runtime());
  });
}

template <class Scalar>
void run_backward(const Stack& stack, const BackwardTensors& grads) {
  if constexpr (std::is_floating_point_v<Scalar>) {
    const Wave wave = wave_of(stack, Pass::backward);
    if (wave.layers > 1 && lowest_layer(stack, grads) < stack.layers - 1) {
      return run_backward_wave<Scalar>(stack, wave, grads);
    }
  }
  const int64_t lowest = lowest_layer(stack, grads);
  std::optional<Tensor> grad_output = grads.grad_output;
  for (int64_t k = stack.layers; k-- > lowest;) {
    const int64_t D = input_size(stack, k);
    std::optional<Tensor> grad_input = grads.grad_input;
    if (k > lowest) grad_input = empty_rows(stack.batch, D, stack.dtype);
    run_directions(stack, D, !grad_input, [&](int64_t d, const Call& call) {
      kernels().KernelsFor<Scalar>::backward(
          backward_of<Scalar>(stack, grads, k, d, grad_output, grad_input), call.runtime());
    });
    grad_output = grad_input;
  }
}

// What no kernel writes: padding, sequences without rows, the second bias.
template <class Scalar>
void finish_backward(const Stack& stack, const BackwardTensors& grads) {
  const int64_t H = stack.H;
  if (grads.grad_input) clear_padding(stack.batch, *grads.grad_input);
  if (grads.grad_hx) {
    for_each_idle_state(stack, [&](int64_t state, int64_t b) {
      Scalar* grad = mutable_data<Scalar>(*grads.grad_hx) + (state * stack.batch.B + b) * H;
      for (int64_t j = 0; j < H; ++j) {
        grad[j] = grads.grad_h_n
                      ? const_data<Scalar>(*grads.grad_h_n)[state * grads.grad_h_n->stride(0) +
                                                            b * grads.grad_h_n->stride(1) +
                                                            j * grads.grad_h_n->stride(2)]
                      : Scalar();
      }
    });
  }
  for (size_t i = 0; i < grads.grad_weights.size() && stack.per_direction == 4; i += 4) {
    if (!grads.want_weights[i / 4 / size_t(stack.directions)]) continue;
    std::copy_n(const_data<Scalar>(grads.grad_weights[i + 2]), H,
                mutable_data<Scalar>(grads.grad_weights[i + 3]));
  }
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
    const Tensor& input, const std::optional<Tensor>& hx, const std::vector<Tensor>& weights,
    const Tensor& output, const std::vector<Tensor>& hidden, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& reset, int64_t bits, bool want_input, bool want_hx,
    const std::vector<int64_t>& want_layers) {
  const Options options = read_options(bits);
  const Stack stack =
      check_stack(input, hx, weights, read_batch(input, rows, reset, options), options);
  const std::vector<int64_t> state_shape{stack.layers * stack.directions, stack.batch.B, stack.H};
  std::vector<int64_t> output_shape(input.sizes().begin(), input.sizes().end());
  output_shape.back() = stack.directions * stack.H;

  BackwardTensors grads;
  check(int64_t(hidden.size()) == stack.layers - 1, "hidden must hold the outputs of ",
        stack.layers - 1, " layer(s), got ", hidden.size());
  for (const Tensor& of_layer : hidden) {
    check_tensor("hidden", of_layer, input, output_shape);
    grads.outputs.push_back(with_adjacent_features(of_layer));
  }
  check_tensor("output", output, input, output_shape);
  grads.outputs.push_back(with_adjacent_features(output));
  if (grad_output) {
    check_tensor("grad_output", *grad_output, input, output_shape);
    grads.grad_output = with_adjacent_features(*grad_output);
  }
  if (grad_h_n) {
    check_tensor("grad_h_n", *grad_h_n, input, state_shape);
    grads.grad_h_n = *grad_h_n;
  }
  if (want_input) grads.grad_input = empty_rows(stack.batch, stack.D, stack.dtype);
  if (want_hx) grads.grad_hx = empty(state_shape, stack.dtype);
  grads.want_weights.resize(size_t(stack.layers), false);
  for (const int64_t k : want_layers) {
    check(k >= 0 && k < stack.layers, "want_layers must be from 0 to ", stack.layers - 1, ", got ",
          k);
    grads.want_weights[size_t(k)] = true;
  }
  const size_t per_layer = size_t(stack.directions * stack.per_direction);
  for (size_t i = 0; i < stack.weights.size() && !want_layers.empty(); ++i) {
    const auto sizes = stack.weights[i].sizes();
    grads.grad_weights.push_back(
        grads.want_weights[i / per_layer]
            ? empty(std::vector<int64_t>(sizes.begin(), sizes.end()), stack.dtype)
            : empty({0}, stack.dtype));
  }
  with_storage(stack.dtype, [&](auto storage) {
    using Scalar = decltype(storage);
    if (stack.batch.steps.N > 0) {
      run_backward<Scalar>(stack, grads);
    } else {
      for (Tensor& w : grads.grad_weights) torch::stable::zero_(w);
    }
    finish_backward<Scalar>(stack, grads);
  });
  return {grads.grad_input ? *grads.grad_input : empty({0}, stack.dtype),
          grads.grad_hx ? *grads.grad_hx : empty({0}, stack.dtype), grads.grad_weights};
}

// ---- What the library says of itself ----

std::tuple<int64_t, int64_t, double, int64_t> cpu_plan(const std::vector<int64_t>& batch_sizes,
                                                       int64_t input_size, int64_t hidden_size,
                                                       int64_t num_layers, int64_t threads,
                                                       int64_t near_bytes) {
  Steps steps{int64_t(batch_sizes.size()), 0, 0, batch_sizes.data(), nullptr, nullptr, nullptr};
  for (const int64_t size : batch_sizes) {
    steps.B = std::max(steps.B, size);
    steps.N += size;
  }
  const Machine machine{threads, size_t(near_bytes)};
  const int64_t panels = panels_of(hidden_size);
  const Plan plan = choose_plan(steps, machine, input_size, hidden_size, panels, sizeof(float));
  const Wave wave =
      choose_wave(steps, machine, hidden_size, panels, sizeof(float), num_layers, Pass::forward);
  return {plan.groups, plan.members, plan.time, wave.layers};
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
