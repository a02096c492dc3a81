// Runs the kernels without torch, on threads that sanitizers can follow.
//
// Divides the work in every way, among threads that arrive together, late or not at all. Results
// that do not depend on the division must be bit-identical to those of one thread. The commands
// that build this file with the kernels' static libraries are `make sanitize`, `make
// sanitize-threads` and, for ARM, `make test-arm`.
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdio>

#include "driver.h"

namespace namernn_fast {
namespace {

enum class Kind { dense, batch_first, packed, any_order, jagged };
constexpr unsigned kKinds = 5;

struct Problem {
  int64_t D, H, T, B;
  int64_t V;  // rows of the table, with token ids and D = 0; otherwise 0
  Kind kind;
  size_t l2_bytes;
  InPlace in_place;
  bool reverse, relu, bias, hx, resets, batch_invariant, packed_before, expanded_grad;
  bool want_output, want_input, want_hx, want_weights, accumulate_input, accumulate_weights;
};

template <class Storage>
struct Results {
  const Problem p;
  Array<Storage> output, h_n, grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias;
  Array<Storage> last_state;  // h_n of a run without an output, if !want_output

  Results(const Problem& p, int64_t rows)
      : p(p),
        output(rows * p.H),
        h_n(p.B * p.H),
        grad_input(rows * p.D),
        grad_hx(p.B * p.H),
        grad_weight_ih(p.H * (p.D + p.V)),
        grad_weight_hh(p.H * p.H),
        grad_bias(p.H),
        last_state(p.want_output ? 0 : p.B * p.H) {}

  // What is wrong with these results on their own, or null.
  const char* error() const {
    const bool complete =
        h_n.is_finite() && (!p.want_hx || grad_hx.is_finite()) &&
        (!p.want_weights || (grad_weight_ih.is_finite() && grad_weight_hh.is_finite() &&
                             (!p.bias || grad_bias.is_finite())));
    if (!complete) return "a result is not finite";
    if (!p.want_output && !(last_state == h_n)) return "h_n differs without an output";
    return nullptr;
  }
  // Compares bits. `sums`: also the gradients that are sums over sequences, whose rounding depends
  // on the number of groups.
  bool equal(const Results& other, bool sums) const {
    return output == other.output && h_n == other.h_n && grad_input == other.grad_input &&
           grad_hx == other.grad_hx &&
           (!sums || (grad_weight_ih == other.grad_weight_ih &&
                      grad_weight_hh == other.grad_weight_hh && grad_bias == other.grad_bias));
  }
};

// Which rows exist and where they lie.
struct Shape {
  std::vector<int64_t> count, start, order, origin;
  int64_t N = 0;     // rows that exist
  int64_t rows = 0;  // rows of a tensor, including padding
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

// The tensors that both passes read, and the layer that refers to them.
template <class Storage>
struct Arguments {
  Array<Storage> input, hx, table, weight_ih, weight_hh, bias_ih, bias_hh;
  Array<int64_t> ids;  // -1 in padding
  Guarded resets;
  Layer<Storage> layer{};

  Arguments(const Problem& p, const Shape& shape, Random& random)
      : input(shape.rows * p.D, random, 0),
        hx(p.B * p.H, random, 0),
        table(p.V * p.H, random, 0),
        weight_ih(p.H * p.D, random, 3),
        weight_hh(p.H * p.H, random, 3),
        bias_ih(p.H, random, 3),
        bias_hh(p.H, random, 3),
        ids(p.V ? shape.rows : 0),
        resets(p.T * p.B, 1) {
    for (int64_t i = 0; i < p.T * p.B; ++i) resets.data()[i] = random.bits() < 1u << 30;
    layer.layout = shape.layout;
    layer.D = p.D;
    layer.H = p.H;
    layer.reverse = p.reverse;
    layer.activation = p.relu ? Activation::relu : Activation::tanh;
    if (p.V) {
      draw_ids(p, shape, random);
      layer.table = {rows_of<const int64_t>(p, ids.data(), 1), table.data(), p.V};
    } else {
      layer.input = rows_of<const Storage>(p, input.data(), p.D);
      layer.weight_ih = weight_ih.data();
    }
    layer.hx = p.hx ? hx.data() : nullptr;
    layer.hx_stride = p.H;
    layer.weight_hh = weight_hh.data();
    layer.bias_ih = p.bias ? bias_ih.data() : nullptr;
    layer.bias_hh = p.bias ? bias_hh.data() : nullptr;
    if (p.resets) layer.resets = {reinterpret_cast<const bool*>(resets.data()), p.B};
    layer.batch_invariant = p.batch_invariant;
    layer.chains = {kChain, kChain};
    layer.in_place = p.in_place;
  }

 private:
  void draw_ids(const Problem& p, const Shape& shape, Random& random) {
    const RowStrides<int64_t> rows = rows_of<int64_t>(p, ids.data(), 1);
    const SequenceLayout& layout = shape.layout;
    for (int64_t t = 0; t < p.T; ++t) {
      for (int64_t b = 0; b < shape.count[t]; ++b) {
        int64_t& id = layout.start
                          ? rows.data[layout.start[t] + b]
                          : rows.data[t * rows.time_stride +
                                      (layout.origin ? layout.origin[b] : b) * rows.row_stride];
        id = random.below(p.V);
      }
    }
  }
};

template <class Storage>
void run_forward(const KernelsFor<Storage>& kernels, const Problem& p, const Layer<Storage>& layer,
                 const Results<Storage>& results, const Runtime& runtime) {
  std::unique_ptr<Guarded> panels;
  Forward<Storage> forward{layer, rows_of(p, results.output.data(), p.H), results.h_n.data()};
  if (p.packed_before && kernels.forward_panels.pack) {
    forward.layer = with_panels(kernels.forward_panels, layer, panels, runtime);
  }
  kernels.forward(forward, runtime);
  free_scratch();
  if (p.want_output) return;
  forward.output = {};
  forward.h_n = results.last_state.data();
  kernels.forward(forward, runtime);
  free_scratch();
}

template <class Storage>
void run_backward(const KernelsFor<Storage>& kernels, const Problem& p, const Layer<Storage>& layer,
                  const Results<Storage>& results, Random& random, const Runtime& runtime) {
  const Array<Storage> grad_output(results.output.size(), random, 0);
  const Array<Storage> grad_h_n(p.expanded_grad ? 1 : p.B * p.H, random, 0);
  std::unique_ptr<Guarded> panels;
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
  backward.grad_hx = p.want_hx ? results.grad_hx.data() : nullptr;
  if (p.want_weights) {
    backward.grad_weight_ih = results.grad_weight_ih.data();
    backward.grad_weight_hh = results.grad_weight_hh.data();
    backward.grad_bias = p.bias ? results.grad_bias.data() : nullptr;
  }
  backward.accumulate_weights = p.accumulate_weights;
  kernels.backward(backward, runtime);
  free_scratch();
}

template <class Storage>
Results<Storage> run(const KernelsFor<Storage>& kernels, const Problem& p, const Runtime& runtime) {
  Random random;
  const Shape shape(p);
  const Arguments<Storage> arguments(p, shape, random);
  Results<Storage> results(p, shape.rows);
  if (p.accumulate_input) results.grad_input.draw(random, 0);
  if (p.accumulate_weights) {
    results.grad_weight_ih.draw(random, 0);
    results.grad_weight_hh.draw(random, 0);
    results.grad_bias.draw(random, 0);
  }
  run_forward(kernels, p, arguments.layer, results, runtime);
  run_backward(kernels, p, arguments.layer, results, random, runtime);
  return results;
}

// Bits for the options that do not interact. Hashing the round keeps every bit independent of the
// layouts, which cycle with the rounds.
uint32_t bits_of(uint32_t round) {
  uint32_t bits = round * 0x9e3779b1u;
  bits = (bits ^ bits >> 16) * 0x85ebca6bu;
  bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
  return bits ^ bits >> 16;
}

// `options` enumerates the layouts and directions, with inputs and with a table. `bits` draws the
// rest.
template <class Storage>
Problem problem_of(const int64_t (&shape)[4], unsigned options, uint32_t bits) {
  const auto bit = [&](int i) { return (bits >> (31 - i) & 1) != 0; };
  const auto& [D, H, T, B] = shape;
  Problem p{};
  const bool table = options / kKinds / 2 != 0;
  p.D = table ? 0 : D, p.H = H, p.T = T, p.B = B;
  p.V = table ? D : 0;
  p.kind = Kind(options % kKinds);
  p.reverse = options / kKinds % 2 != 0;
  p.hx = bit(0), p.packed_before = bit(1), p.expanded_grad = bit(2);
  p.want_input = !table && bit(3), p.want_hx = bit(4), p.want_weights = bit(5);
  p.accumulate_input = p.want_input && bit(6);
  p.l2_bytes = bit(7) ? 1 << 14 : 1 << 22;
  p.accumulate_weights = p.want_weights && sizeof(Storage) > 2 && bit(8);
  p.resets = bit(9), p.batch_invariant = bit(10), p.bias = bit(11), p.relu = bit(12);
  p.want_output = bit(13);
  p.in_place = {!table && bit(14), bit(15)};
  return p;
}

template <class Storage>
void check(const char* name, const KernelsFor<Storage>& kernels) {
  // The last shape has enough rows per group that two groups accumulate gradients apart.
  static const int64_t shapes[][4] = {{1, 1, 1, 1},   {5, 7, 6, 3},    {16, 48, 5, 1},
                                      {9, 130, 4, 7}, {3, 200, 70, 3}, {20, 33, 40, 30},
                                      {2, 3, 260, 65}};
  static const Plan plans[] = {{2, 1, 0}, {1, 2, 0}, {3, 1, 0}, {1, 3, 0}, {2, 2, 0}, {2, 3, 0}};
  unsigned round = 0;
  for (const auto& shape : shapes) {
    for (unsigned options = 0; options < 4 * kKinds; ++options) {
      const Problem p = problem_of<Storage>(shape, options, bits_of(round));
      forced_plan = {1, 1, 0};
      const Results<Storage> alone = run(kernels, p, runtime_of(1, p.l2_bytes));
      const char* error = alone.error();
      for (const Plan& plan : plans) {
        if (error) break;
        forced_plan = plan;
        arrival = Arrival(round++ % 4);
        const Results<Storage> shared =
            run(kernels, p, runtime_of(plan.groups * plan.members, p.l2_bytes));
        error = shared.error();
        if (!shared.equal(alone, plan.groups == 1)) error = "bits differ from those of one thread";
      }
      if (!error) continue;
      std::fprintf(stderr,
                   "%s, %zu bytes, (D, V, H, T, B) = (%d, %d, %d, %d, %d), options %u, %d x %d: ",
                   name, sizeof(Storage), int(p.D), int(p.V), int(p.H), int(p.T), int(p.B), options,
                   int(forced_plan.groups), int(forced_plan.members));
      fail(error);
    }
  }
  std::printf("%s, %zu bytes: %u runs\n", name, sizeof(Storage), round);
  std::fflush(stdout);
}

void check_all(const Kernels& kernels) {
  check_accuracy(kernels);
  check<float>(kernels.name, kernels);
  check<double>(kernels.name, kernels);
  check<BFloat16>(kernels.name, kernels);
  check<Half>(kernels.name, kernels);
  check_trees(kernels);
}

}  // namespace
}  // namespace namernn_fast

// With any argument, only the baseline kernels run: an ARM emulator would be slow on the emulated
// pairs, and the other kernels are for x86.
int main(int argc, char**) {
  using namespace namernn_fast;
  check_all(kernels_baseline);
  if (argc > 1) return 0;
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
