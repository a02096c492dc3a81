// Random single-layer test problems, shared by kernels.cpp and accuracy.cpp. Defines their sizes,
// options, layouts and arguments, and runs their forward and backward passes.
#pragma once

#include <algorithm>
#include <iterator>

#include "driver.h"
#include "rows.h"

namespace namernn_fast {

enum class Kind { dense, batch_first, packed, any_order, jagged };
constexpr unsigned kKinds = 5;
// Number of combinations of layout, direction and kind of input (features or token ids).
constexpr unsigned kOptions = 4 * kKinds;

constexpr int kTestedInputs = 2;  // maximum number of inputs besides x of a cell

// Results. Those of inputs, states and parameters are ranges, in the order of the cell's states and
// of Parameter.
enum Name {
  kOutput,
  kKept,
  kGradInput,
  kGradBeside,
  kLast = kGradBeside + kTestedInputs,
  kGradInitial = kLast + kMostStates,
  kGradParameters = kGradInitial + kMostStates,
  kNames = kGradParameters + kParameters
};
inline Name grad_beside_of(int input) { return Name(kGradBeside + input); }
inline Name last_of(int state) { return Name(kLast + state); }
inline Name initial_gradient_of(int state) { return Name(kGradInitial + state); }
inline Name gradient_of(int parameter) { return Name(kGradParameters + parameter); }
constexpr const char* names[] = {"output",          "kept",
                                 "grad_input",      "grad of input 0",
                                 "grad of input 1", "h_n",
                                 "last state 1",    "last state 2",
                                 "last state 3",    "grad_hx",
                                 "grad of state 1", "grad of state 2",
                                 "grad of state 3", "grad_weight_ih",
                                 "grad_weight_hh",  "grad_bias_ih",
                                 "grad_bias_hh",    "grad_weight_hr",
                                 "grad of own 0",   "grad of own 1",
                                 "grad of own 2",   "grad of own 3",
                                 "grad of own 4",   "grad of own 5",
                                 "grad of own 6",   "grad of own 7"};
static_assert(std::size(names) == kNames);

struct Problem {
  const TestedCell* cell;
  int64_t D, H, T, B;
  int64_t V;  // rows of the table if the input is token ids (then D = 0); otherwise 0
  int64_t heads;
  bool sums_given;  // whether the input holds the sums over x (then D = 0)
  Kind kind;
  size_t l2_bytes;
  InPlace in_place;
  bool reverse, relu, bias, hx, resets, batch_invariant, packed_before;
  bool grad_output;
  bool grad_last[kMostStates], expanded_grad[kMostStates];
  bool beside[kTestedInputs], want_beside[kTestedInputs];  // for each input besides x
  bool want_output, want_input, want_hx, want_weights, accumulate_input, accumulate_weights;

  int64_t gate_rows() const { return cell->gates * H; }
  // Returns the number of elements of h.
  int64_t P() const { return cell->projects ? (H + 1) / 2 : H; }
  // Returns the number of elements of h that a unit multiplies.
  int64_t R() const { return heads == 1 ? P() : H / heads; }
  // Returns the number of elements in an input row.
  int64_t input_features() const { return sums_given ? gate_rows() : D; }
  // Returns the number of elements of a state; 0 if the cell lacks the state.
  int64_t size_of_state(int i) const { return i == 0 ? P() : i < cell->states ? H : 0; }

  // Returns whether the forward pass also runs as in inference. This second run keeps nothing for
  // the backward pass, and writes the output only if want_output is set.
  bool infers() const { return cell->kept || !want_output; }

  // Returns whether the layer has a parameter.
  bool has(int parameter) const {
    if (parameter == kBiasIh) return bias;
    if (parameter == kBiasHh) return bias && cell->has_weight_hh;
    if (parameter == kWeightHh) return cell->has_weight_hh;
    if (parameter == kWeightIh) return !sums_given;
    return parameter == kWeightHr ? P() < H : parameter < kOwn + cell->own;
  }
  // Returns the number of elements of a parameter, or of the table that replaces weight_ih.
  int64_t size_of_parameter(int parameter) const {
    switch (parameter) {
      case kWeightIh:
        return gate_rows() * (D + V);
      case kWeightHh:
        return gate_rows() * R();
      case kWeightHr:
        return P() * H;
      default:
        return parameter >= kOwn ? cell->own_blocks[parameter - kOwn] * H : gate_rows();
    }
  }

  // Returns whether the passes write the result `name`.
  bool wants(Name name) const {
    if (name == kGradInput) return want_input;
    if (name >= kGradBeside && name < kLast) return want_beside[name - kGradBeside];
    if (name < kLast) return true;
    if (name < kGradInitial) return name - kLast < cell->states;
    if (name < kGradParameters) return want_hx && name - kGradInitial < cell->states;
    const bool is_copied = name == gradient_of(kBiasHh) && cell->one_bias_gradient;
    return want_weights && has(name - kGradParameters) && !is_copied;
  }
  bool accumulates(Name name) const {
    return name == kGradInput ? accumulate_input : name >= kGradParameters && accumulate_weights;
  }

  // Returns the number of elements in the result `name` if tensors have `rows` rows.
  int64_t size_of(Name name, int64_t rows) const {
    if (!wants(name)) return 0;
    switch (name) {
      case kOutput:
        return rows * P();
      case kKept:
        return rows * cell->kept * H;
      case kGradInput:
        return rows * input_features();
      default:
        break;
    }
    if (name < kLast) return rows * features_beside(*cell, name - kGradBeside, H);
    if (name >= kGradParameters) return size_of_parameter(name - kGradParameters);
    return B * size_of_state(name < kGradInitial ? name - kLast : name - kGradInitial);
  }
};

// Returns random bits for the options that do not interact. The bits are a hash of the round, so
// that they do not correlate with the layouts, which repeat periodically.
inline uint32_t bits_of(uint32_t round) {
  uint32_t bits = round * 0x9e3779b1u;
  bits = (bits ^ bits >> 16) * 0x85ebca6bu;
  bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
  return bits ^ bits >> 16;
}

// Returns a problem of this shape. `options` determines the layout, the direction, and whether the
// input is features or token ids. `bits` determines all other options.
template <class Storage>
Problem problem_of(const TestedCell& cell, const int64_t (&shape)[4], unsigned options,
                   uint32_t bits) {
  const auto bit = [&](int i) { return (bits >> (31 - i) & 1) != 0; };
  const auto& [D, H, T, B] = shape;
  Problem p{};
  p.cell = &cell;
  const bool table = options / kKinds / 2 != 0;
  p.sums_given = !table && cell.in_floats && bit(22);
  p.D = table || p.sums_given ? 0 : D, p.H = H, p.T = T, p.B = B;
  const bool has_heads = cell.in_floats && cell.has_weight_hh && !cell.projects && bit(23);
  p.heads = has_heads ? fewest_heads(H) : 1;
  p.V = table ? D : 0;
  p.kind = Kind(options % kKinds);
  p.reverse = options / kKinds % 2 != 0;
  p.hx = bit(0), p.packed_before = bit(1), p.expanded_grad[0] = bit(2);
  p.want_input = !table && bit(3), p.want_hx = bit(4), p.want_weights = bit(5);
  p.accumulate_input = p.want_input && bit(6);
  p.l2_bytes = bit(7) ? 1 << 14 : 1 << 22;
  p.accumulate_weights = p.want_weights && sizeof(Storage) > 2 && bit(8);
  p.resets = bit(9), p.batch_invariant = bit(10), p.bias = bit(11), p.relu = bit(12);
  p.want_output = bit(13);
  p.in_place = {p.D > 0 && bit(14), cell.has_weight_hh && bit(15)};
  p.grad_output = bit(16);
  bool has_grad = p.grad_output;
  for (int i = 1; i < cell.states; ++i) {
    const int first = i == 1 ? 18 : 20 + 2 * i;
    p.grad_last[i] = bit(first), p.expanded_grad[i] = bit(first + 1);
    has_grad = has_grad || p.grad_last[i];
  }
  p.grad_last[0] = !has_grad || bit(17);
  for (int i = 0; i < cell.inputs; ++i) {
    const int first = i == 0 ? 20 : 28;
    p.beside[i] = bit(first), p.want_beside[i] = p.beside[i] && bit(first + 1);
  }
  return p;
}

// Which rows exist, and where they are in memory.
struct Shape {
  std::vector<int64_t> count, start, length, order, origin;
  Kind kind;
  int64_t N = 0;     // number of rows that exist
  int64_t rows = 0;  // number of rows of a tensor, including padding
  SequenceLayout layout{};

  explicit Shape(const Problem& p)
      : count(p.T), start(p.T), length(p.B), order(p.B), origin(p.B), kind(p.kind) {
    const bool ordered = kind == Kind::any_order || kind == Kind::jagged;
    const bool ragged = ordered || kind == Kind::packed;
    for (int64_t t = 0; t < p.T; ++t) {
      count[t] = ragged ? std::max<int64_t>(1, p.B - t * p.B / p.T) : p.B;
      start[t] = N;
      N += count[t];
      for (int64_t b = 0; b < count[t]; ++b) ++length[b];
    }
    for (int64_t b = 0; b < p.B; ++b) order[b] = ordered ? (p.B + p.B / 2 - b) % p.B : b;
    for (int64_t b = 0; b < p.B; ++b) {
      if (kind == Kind::any_order) origin[b] = order[b];
      for (int64_t other = 0; other < p.B && kind == Kind::jagged; ++other) {
        if (order[other] < order[b]) origin[b] += length[other];
      }
    }
    rows = kind == Kind::any_order ? p.T * p.B : N;
    layout.T = p.T;
    layout.B = p.B;
    layout.N = N;
    if (ragged) layout.count = count.data();
    if (kind == Kind::packed) layout.start = start.data();
    if (ordered) layout.order = order.data();
    if (ordered) layout.origin = origin.data();
  }
  Shape(const Shape&) = delete;
  Shape& operator=(const Shape&) = delete;

  // Returns the index of row (t, b) in a tensor's memory.
  int64_t row(int64_t t, int64_t b) const {
    switch (kind) {
      case Kind::dense:
        return t * layout.B + b;
      case Kind::batch_first:
        return b * layout.T + t;
      case Kind::packed:
        return start[t] + b;
      case Kind::any_order:
        return t * layout.B + origin[b];
      default:
        return origin[b] + t;
    }
  }
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

// The tensors that the forward and the backward pass read, and the arguments that the two passes
// share.
template <class Storage>
struct Arguments {
  Array<Storage> input;
  // Indexed by state. Rows of state i are i elements longer than the state, to catch mix-ups.
  std::vector<Array<Storage>> initial;
  std::vector<Array<Storage>> parameters;  // indexed by Parameter; weight_ih may be the table
  Array<Storage> grad_output;
  std::vector<Array<Storage>> grad_last;  // indexed by state
  std::vector<Array<Storage>> beside;     // inputs besides x; empty if absent
  Array<int64_t> ids;                     // -1 in padding
  Guarded resets;
  Layer<Storage> layer{};

  Arguments(const Problem& p, const Shape& shape, Random& random)
      : input(shape.rows * p.input_features(), random, 0),
        grad_output(shape.rows * p.P(), random, 0),
        ids(p.V ? shape.rows : 0),
        resets(p.T * p.B, 1) {
    for (int64_t i = 0; i < p.T * p.B; ++i) resets.data()[i] = random.bits() < 1u << 30;
    for (int i = 0; i < p.cell->states; ++i) {
      const int64_t size = p.size_of_state(i);
      initial.emplace_back(p.B * (size + i), random, 0);
      grad_last.emplace_back(p.expanded_grad[i] ? 1 : p.B * size, random, 0);
      if (p.hx) layer.initial[i] = {initial[i].data(), size + i};
    }
    for (int i = 0; i < kParameters; ++i) {
      // Rates, and the sums in a table, are larger than weights.
      const int exponent = i >= kOwn || (i == kWeightIh && p.V) ? 0 : 3;
      parameters.emplace_back(p.has(i) ? p.size_of_parameter(i) : 0, random, exponent);
      layer.parameters[i] = parameters[i].data_or_null();
    }
    layer.cell = p.cell;
    layer.layout = shape.layout;
    layer.D = p.D;
    layer.H = p.H;
    layer.P = p.P();
    layer.heads = p.heads;
    layer.sums_given = p.sums_given;
    layer.reverse = p.reverse;
    layer.activation = p.relu ? Activation::relu : Activation::tanh;
    if (p.V) {
      for (int64_t t = 0; t < p.T; ++t) {
        for (int64_t b = 0; b < shape.count[t]; ++b) {
          ids.data()[shape.row(t, b)] = random.below(p.V);
        }
      }
      layer.table = {rows_of<const int64_t>(p, ids.data(), 1), layer.parameters[kWeightIh], p.V,
                     nullptr};
      layer.parameters[kWeightIh] = nullptr;
    } else {
      layer.input = rows_of<const Storage>(p, input.data(), p.input_features());
    }
    for (int i = 0; i < p.cell->inputs; ++i) {
      const int64_t features = features_beside(*p.cell, i, p.H);
      beside.emplace_back(p.beside[i] * shape.rows * features, random, 2);
      if (p.beside[i]) layer.inputs[i] = rows_of<const Storage>(p, beside[i].data(), features);
    }
    if (p.resets) layer.resets = {reinterpret_cast<const bool*>(resets.data()), p.B};
    layer.batch_invariant = p.batch_invariant;
    layer.chains = {kChain, kChain};
    layer.in_place = p.in_place;
  }
};

template <class Storage>
struct Results {
  const Problem p;
  const int64_t N;
  std::vector<Array<Storage>> arrays;  // indexed by Name; empty for results that are not requested
  // From the run that keeps nothing; `inferred_last` is indexed by state.
  Array<Storage> inferred_output;
  std::vector<Array<Storage>> inferred_last;

  // Draws initial values for the gradients that the passes add to.
  Results(const Problem& p, const Shape& shape, Random& random)
      : p(p), N(shape.N), inferred_output(p.infers() && p.want_output ? shape.rows * p.P() : 0) {
    for (int i = 0; i < p.cell->states; ++i) {
      inferred_last.emplace_back(p.infers() ? p.size_of(last_of(i), shape.rows) : 0);
    }
    for (int i = 0; i < kNames; ++i) {
      arrays.emplace_back(p.size_of(Name(i), shape.rows));
      if (p.accumulates(Name(i))) arrays.back().draw(random, 0);
    }
  }

  const Array<Storage>& operator[](Name name) const { return arrays[name]; }
  // Returns the pointer to pass for a result, or null if the result is not requested.
  Storage* data(Name name) const { return p.wants(name) ? arrays[name].data() : nullptr; }

  // Checks finiteness, padding and the inference run. Returns an error message, or null if correct.
  const char* error() const {
    for (int i = 0; i < kNames; ++i) {
      const Array<Storage>& found = arrays[i];
      const bool accumulates = p.accumulates(Name(i));
      if (found.count_finite() != (accumulates ? found.size() : p.size_of(Name(i), N))) {
        return "a result is not finite, or padding was written";
      }
    }
    if (!p.infers()) return nullptr;
    for (int i = 0; i < p.cell->states; ++i) {
      if (!(inferred_last[i] == arrays[last_of(i)])) return "a state differs if nothing is kept";
    }
    if (p.want_output && !(inferred_output == arrays[kOutput])) {
      return "the output differs if nothing is kept";
    }
    return nullptr;
  }
  // Compares these results with `alone`, the results of a run on one thread. Returns a message if
  // they differ, otherwise null. Gradients that are sums over sequences are compared only up to
  // rounding in two cases: if there are several groups, or if one run may cut the sequences into
  // parts and the other does not. With a small cache, one thread cuts many sequences into parts,
  // but members that split the hidden units do not.
  const char* difference(const Results& alone, int64_t groups) const {
    const bool parts = p.B > 64 && p.l2_bytes < 1 << 20;
    for (int i = 0; i < kNames; ++i) {
      const bool equal = (groups == 1 && !parts) || i < kGradParameters
                             ? arrays[i] == alone.arrays[i]
                             : agree(arrays[i], alone.arrays[i]);
      if (!equal) return "results differ from a run on one thread";
    }
    return nullptr;
  }
};

template <class Storage>
void run_forward(const KernelsFor<Storage>& kernels, const Problem& p, const Layer<Storage>& layer,
                 const Results<Storage>& results, const Runtime& runtime) {
  std::unique_ptr<Guarded> panels;
  Forward<Storage> forward{};
  forward.layer = layer;
  if (p.packed_before && kernels.forward_panels.pack) {
    forward.layer = with_panels(kernels.forward_panels, layer, panels, runtime);
  }
  forward.output = rows_of(p, results.data(kOutput), p.P());
  if (p.cell->kept) forward.kept = rows_of(p, results.data(kKept), p.cell->kept * p.H);
  for (int i = 0; i < p.cell->states; ++i) forward.last[i] = results.data(last_of(i));
  kernels.forward(forward, runtime);
  free_scratch();
  if (!p.infers()) return;
  forward.output = {};
  if (p.want_output) forward.output = rows_of(p, results.inferred_output.data(), p.P());
  forward.kept = {};
  for (int i = 0; i < p.cell->states; ++i) {
    forward.last[i] = results.inferred_last[i].data();
    // The second run, as in inference, updates the cell states in place.
    const auto [initial, stride] = layer.initial[i];
    if (i == 0 || !initial) continue;
    for (int64_t b = 0; b < p.B; ++b) {
      std::copy_n(initial + b * stride, p.H, forward.last[i] + b * p.H);
    }
    forward.layer.initial[i] = {forward.last[i], p.H};
  }
  kernels.forward(forward, runtime);
  free_scratch();
}

// Returns the gradients of last states: [B, size], or one value that is expanded to this shape.
template <class Storage>
StateGradients<Storage> state_gradients(const Array<Storage>& gradients, int64_t size,
                                        bool expanded) {
  if (expanded) return {gradients.data(), 0, 0};
  return {gradients.data(), size, 1};
}

template <class Storage>
void run_backward(const KernelsFor<Storage>& kernels, const Problem& p,
                  const Arguments<Storage>& arguments, const Results<Storage>& results,
                  const Runtime& runtime) {
  std::unique_ptr<Guarded> panels;
  Backward<Storage> backward{};
  backward.layer = arguments.layer;
  if (p.packed_before && kernels.backward_panels.pack) {
    backward.layer = with_panels(kernels.backward_panels, arguments.layer, panels, runtime);
  }
  backward.output = rows_of<const Storage>(p, results.data(kOutput), p.P());
  if (p.cell->kept) {
    backward.kept = rows_of<const Storage>(p, results.data(kKept), p.cell->kept * p.H);
  }
  if (p.grad_output) {
    backward.grad_output = rows_of<const Storage>(p, arguments.grad_output.data(), p.P());
  }
  for (int i = 0; i < p.cell->states; ++i) {
    backward.grad_initial[i] = results.data(initial_gradient_of(i));
    if (!p.grad_last[i]) continue;
    backward.grad_last[i] =
        state_gradients(arguments.grad_last[i], p.size_of_state(i), p.expanded_grad[i]);
  }
  if (p.want_input) {
    backward.grad_input = rows_of(p, results.data(kGradInput), p.input_features());
  }
  backward.accumulate_input = p.accumulate_input;
  for (int i = 0; i < p.cell->inputs; ++i) {
    if (!p.want_beside[i]) continue;
    backward.grad_inputs[i] =
        rows_of(p, results.data(grad_beside_of(i)), features_beside(*p.cell, i, p.H));
  }
  for (int i = 0; i < kParameters; ++i) backward.grads[i] = results.data(gradient_of(i));
  backward.wants_weights = p.want_weights;
  backward.accumulate_weights = p.accumulate_weights;
  kernels.backward(backward, runtime);
  free_scratch();
}

// Runs the forward and the backward pass.
template <class Storage>
void run(const KernelsFor<Storage>& kernels, const Problem& p, const Arguments<Storage>& arguments,
         const Results<Storage>& results, const Runtime& runtime) {
  run_forward(kernels, p, arguments.layer, results, runtime);
  run_backward(kernels, p, arguments, results, runtime);
}

}  // namespace namernn_fast
