// Runs the kernels by themselves, for the sanitizers: without torch, on threads they can follow.
//
// The work is shared out in every way, with threads that come together, late, or not at all. The
// results that do not depend on it must have the bits of a run on one thread. Linked with the
// kernels' static libraries by `make sanitize` and `make sanitize-threads`.
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "contract.h"
#include "plan.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (void(address), void(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (void(address), void(size))
#endif

namespace namernn_fast {

extern const KernelsFor<BFloat16> kernels_emulated_pairs;  // of emulated_pairs.cpp

namespace {

Plan forced_plan{1, 1, 0};

}  // namespace

// Definitions in place of plan.cpp: the driver says how work is shared out.
Plan choose_plan(const Workload& workload) {
  return {std::min(forced_plan.groups, workload.layout.B),
          std::min(forced_plan.members, workload.panels), 0};
}
int64_t choose_workers(double, const Machine& machine) { return machine.threads; }

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// NaN in every type, and it ends where a page begins that nobody may touch: what runs over its end
// is seen even in the instructions that no sanitizer looks into.
class Guarded {
 public:
  Guarded(size_t bytes, size_t alignment) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    mapped_ = (rounded + page - 1) / page * page + page;
    map_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) fail("out of memory");
    char* const end = map_ + mapped_ - page;
    mprotect(end, page, PROT_NONE);
    data_ = end - rounded;
    std::memset(data_, 0xff, rounded);
    ASAN_POISON_MEMORY_REGION(map_, data_ - map_);
    ASAN_POISON_MEMORY_REGION(data_ + bytes, rounded - bytes);
  }
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(map_, mapped_);
    munmap(map_, mapped_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  char* data() const { return data_; }

 private:
  char* map_;
  char* data_;
  size_t mapped_;
};

// ---- What the kernels need from the process ----

enum class Arrival { together, late, in_pairs, alone };
Arrival arrival = Arrival::together;
thread_local bool in_region = false;
std::vector<std::unique_ptr<Guarded>> taken;

void parallel(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t chunk = arrival == Arrival::alone ? n : arrival == Arrival::in_pairs ? 2 : 1;
  std::vector<std::thread> threads;
  for (int64_t begin = chunk; begin < n; begin += chunk) {
    threads.emplace_back([=] {
      in_region = true;
      if (arrival == Arrival::late) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      body(context, begin, std::min(begin + chunk, n));
    });
  }
  in_region = true;
  body(context, 0, std::min(chunk, n));
  in_region = false;
  for (std::thread& thread : threads) thread.join();
}

void* scratch(size_t bytes) {
  // Taking memory may throw, and only the thread that called the kernel has scratch memory.
  if (in_region) fail("scratch memory was asked for inside a parallel region");
  taken.push_back(std::make_unique<Guarded>(bytes, 64));
  return taken.back()->data();
}

// ---- One problem: arguments, a run, its results ----

enum class Kind { dense, batch_first, packed, any_order, jagged };
constexpr unsigned kKinds = 5;

struct Problem {
  int64_t D, H, T, B;
  Kind kind;
  bool reverse, relu, bias, hx, resets, batch_invariant, packed_before, expanded_grad;
  bool want_input, want_hx, want_weights, accumulate_input, accumulate_weights;
};

class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
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

template <class Storage>
class Array {
 public:
  explicit Array(int64_t size)
      : size_(size), memory_(std::make_unique<Guarded>(size * sizeof(Storage), sizeof(Storage))) {}
  Array(int64_t size, Random& random, int exponent) : Array(size) { draw(random, exponent); }
  void draw(Random& random, int exponent) {
    for (int64_t i = 0; i < size_; ++i) random.draw(data()[i], exponent);
  }
  Storage* data() const { return reinterpret_cast<Storage*>(memory_->data()); }
  bool operator==(const Array& other) const {
    return std::memcmp(data(), other.data(), size_ * sizeof(Storage)) == 0;
  }

 private:
  int64_t size_;
  std::unique_ptr<Guarded> memory_;
};

template <class Storage>
struct Results {
  Array<Storage> output, h_n, grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias;

  Results(const Problem& p, int64_t rows)
      : output(rows * p.H),
        h_n(p.B * p.H),
        grad_input(rows * p.D),
        grad_hx(p.B * p.H),
        grad_weight_ih(p.H * p.D),
        grad_weight_hh(p.H * p.H),
        grad_bias(p.H) {}
  // The sums over sequences depend on the number of groups, by rounding.
  bool equal(const Results& other, bool sums) const {
    return output == other.output && h_n == other.h_n && grad_input == other.grad_input &&
           grad_hx == other.grad_hx &&
           (!sums || (grad_weight_ih == other.grad_weight_ih &&
                      grad_weight_hh == other.grad_weight_hh && grad_bias == other.grad_bias));
  }
};

// Which rows there are, and where.
struct Shape {
  std::vector<int64_t> count, start, order, origin;
  int64_t N = 0;     // rows that are computed
  int64_t rows = 0;  // that a tensor can hold
  SequenceLayout layout{};

  explicit Shape(const Problem& p) : count(p.T), start(p.T), order(p.B), origin(p.B) {
    const bool ordered = p.kind == Kind::any_order || p.kind == Kind::jagged;
    const bool ragged = ordered || p.kind == Kind::packed;
    std::vector<int64_t> length(p.B);
    for (int64_t t = 0; t < p.T; ++t) {
      count[t] = ragged ? std::max<int64_t>(1, p.B - t * p.B / p.T) : p.B;
      start[t] = N;
      N += count[t];
      for (int64_t b = 0; b < count[t]; ++b) ++length[b];
    }
    for (int64_t b = 0; b < p.B; ++b) order[b] = (p.B + p.B / 2 - b) % p.B;
    for (int64_t b = 0; b < p.B; ++b) {
      if (p.kind == Kind::any_order) origin[b] = order[b];
      for (int64_t other = 0; other < p.B && p.kind == Kind::jagged; ++other) {
        if (order[other] < order[b]) origin[b] += length[other];
      }
    }
    rows = p.kind == Kind::any_order ? p.T * p.B : N;
    layout.T = p.T;
    layout.B = p.B;
    layout.N = N;
    if (ragged) layout.count = count.data();
    if (p.kind == Kind::packed) layout.start = start.data();
    if (ordered) layout.order = order.data();
    if (ordered) layout.origin = origin.data();
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;
};

template <class Element>
RowStrides<Element> rows_of(const Problem& p, Element* data, int64_t features) {
  switch (p.kind) {
    case Kind::batch_first:
      return {data, features, p.T * features};
    case Kind::jagged:
      return {data, features, features};
    default:
      return {data, p.B * features, features};
  }
}

// The layer with its weights in panels that are packed before the pass runs.
template <class Storage>
Layer<Storage> with_panels(const PanelFormat<Storage>& format, Layer<Storage> layer,
                           std::unique_ptr<Guarded>& memory, const Runtime& runtime) {
  memory = std::make_unique<Guarded>(format.bytes(layer.D, layer.H), 64);
  format.pack(layer, memory->data(), runtime);
  taken.clear();
  layer.panels = memory->data();
  layer.weight_ih = layer.weight_hh = layer.bias_ih = layer.bias_hh = nullptr;
  return layer;
}

template <class Storage>
Results<Storage> run(const KernelsFor<Storage>& kernels, const Problem& p, const Runtime& runtime) {
  Random random;
  const Shape shape(p);
  const int64_t rows = shape.rows;
  const Array<Storage> input(rows * p.D, random, 0), hx(p.B * p.H, random, 0);
  const Array<Storage> weight_ih(p.H * p.D, random, 3), weight_hh(p.H * p.H, random, 3);
  const Array<Storage> bias_ih(p.H, random, 3), bias_hh(p.H, random, 3);
  const Array<Storage> grad_output(rows * p.H, random, 0);
  const Array<Storage> grad_h_n(p.expanded_grad ? 1 : p.B * p.H, random, 0);
  const Guarded resets(p.T * p.B, 1);
  for (int64_t i = 0; i < p.T * p.B; ++i) resets.data()[i] = random.bits() < 1u << 30;
  Results<Storage> results(p, rows);

  Layer<Storage> layer{};
  layer.layout = shape.layout;
  layer.D = p.D;
  layer.H = p.H;
  layer.reverse = p.reverse;
  layer.activation = p.relu ? Activation::relu : Activation::tanh;
  layer.input = rows_of<const Storage>(p, input.data(), p.D);
  layer.hx = p.hx ? hx.data() : nullptr;
  layer.hx_stride = p.H;
  layer.weight_ih = weight_ih.data();
  layer.weight_hh = weight_hh.data();
  layer.bias_ih = p.bias ? bias_ih.data() : nullptr;
  layer.bias_hh = p.bias ? bias_hh.data() : nullptr;
  if (p.resets) layer.resets = {reinterpret_cast<const bool*>(resets.data()), p.B};
  layer.batch_invariant = p.batch_invariant;
  layer.chains = {kChain, kChain};
  std::unique_ptr<Guarded> panels;

  Forward<Storage> forward{layer, rows_of(p, results.output.data(), p.H), results.h_n.data()};
  if (p.packed_before && kernels.forward_panels.pack) {
    forward.layer = with_panels(kernels.forward_panels, layer, panels, runtime);
  }
  kernels.forward(forward, runtime);
  taken.clear();

  Backward<Storage> backward{};
  backward.layer = layer;
  if (p.packed_before && kernels.backward_panels.pack) {
    backward.layer = with_panels(kernels.backward_panels, layer, panels, runtime);
  }
  backward.output = rows_of<const Storage>(p, results.output.data(), p.H);
  backward.grad_output = rows_of<const Storage>(p, grad_output.data(), p.H);
  backward.grad_h_n = grad_h_n.data();
  backward.grad_h_n_stride = p.expanded_grad ? 0 : p.H;
  backward.grad_h_n_feature_stride = p.expanded_grad ? 0 : 1;
  if (p.want_input) backward.grad_input = rows_of(p, results.grad_input.data(), p.D);
  backward.accumulate_input = p.accumulate_input;
  if (p.accumulate_input) results.grad_input.draw(random, 0);
  backward.grad_hx = p.want_hx ? results.grad_hx.data() : nullptr;
  if (p.want_weights) {
    backward.grad_weight_ih = results.grad_weight_ih.data();
    backward.grad_weight_hh = results.grad_weight_hh.data();
    backward.grad_bias = p.bias ? results.grad_bias.data() : nullptr;
  }
  backward.accumulate_weights = p.accumulate_weights;
  if (p.accumulate_weights) {
    results.grad_weight_ih.draw(random, 0);
    results.grad_weight_hh.draw(random, 0);
    results.grad_bias.draw(random, 0);
  }
  kernels.backward(backward, runtime);
  taken.clear();
  return results;
}

template <class Storage>
void check(const char* name, const KernelsFor<Storage>& kernels) {
  // The last has rows enough for two groups to gather some of their gradients apart.
  static const int64_t shapes[][4] = {{1, 1, 1, 1},   {5, 7, 6, 3},    {16, 48, 5, 1},
                                      {9, 130, 4, 7}, {3, 200, 70, 3}, {20, 33, 40, 30},
                                      {2, 3, 260, 65}};
  static const Plan plans[] = {{2, 1, 0}, {1, 2, 0}, {3, 1, 0}, {1, 3, 0}, {2, 2, 0}, {2, 3, 0}};
  unsigned round = 0;
  for (const auto& [D, H, T, B] : shapes) {
    for (unsigned options = 0; options < 4 * kKinds; ++options) {
      // The round's number varies what does not interact, bit by bit.
      const auto bit = [&](int i) { return ((round * 2654435761u) >> (31 - i) & 1) != 0; };
      Problem p{};
      p.D = D, p.H = H, p.T = T, p.B = B;
      p.kind = Kind(options % kKinds);
      p.reverse = options / kKinds % 2 != 0;
      p.relu = options / kKinds / 2 != 0;
      p.hx = bit(0), p.packed_before = bit(1), p.expanded_grad = bit(2);
      p.want_input = bit(3), p.want_hx = bit(4), p.want_weights = bit(5);
      p.accumulate_input = p.want_input && bit(6);
      p.accumulate_weights = p.want_weights && sizeof(Storage) > 2 && bit(8);
      p.resets = bit(9), p.batch_invariant = bit(10), p.bias = bit(11);
      Runtime runtime{{1, size_t(bit(7) ? 1 << 14 : 1 << 22)}, &parallel, &scratch, [] {
                        std::this_thread::yield();
                      }};
      forced_plan = {1, 1, 0};
      const Results<Storage> alone = run(kernels, p, runtime);
      for (const Plan& plan : plans) {
        forced_plan = plan;
        runtime.machine.threads = plan.groups * plan.members;
        arrival = Arrival(round++ % 4);
        if (run(kernels, p, runtime).equal(alone, plan.groups == 1)) continue;
        std::fprintf(stderr, "%s, %zu bytes, (D, H, T, B) = (%d, %d, %d, %d), options %u, %d x %d",
                     name, sizeof(Storage), int(D), int(H), int(T), int(B), options,
                     int(plan.groups), int(plan.members));
        fail(": other bits than on one thread");
      }
    }
  }
  std::printf("%s, %zu bytes: %u runs\n", name, sizeof(Storage), round);
}

void check_all(const Kernels& kernels) {
  check<float>(kernels.name, kernels);
  check<double>(kernels.name, kernels);
  check<BFloat16>(kernels.name, kernels);
  check<Half>(kernels.name, kernels);
}

}  // namespace
}  // namespace namernn_fast

int main() {
  using namespace namernn_fast;
  check_all(kernels_baseline);
  check<BFloat16>("emulated pairs", kernels_emulated_pairs);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) check_all(kernels_avx2);
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    check_all(kernels_avx512);
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    check<BFloat16>("avx512_bf16", kernels_avx512_bf16);
  }
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (__builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, request_permission, tile_data) == 0) {
    check<BFloat16>("amx", kernels_amx);
  }
#endif
#endif
}
