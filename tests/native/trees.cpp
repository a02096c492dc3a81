// Runs stacks of two layers on prefix trees, and on the same sequences without sharing. The last
// states must be bit-identical, and the gradients must be equal up to rounding.
#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "driver.h"

namespace namernn_fast {
namespace {

using Sequences = std::vector<std::vector<int64_t>>;

struct Problem {
  const TestedCell* cell;
  int64_t H, T, B, V;
  bool relu, bias, accumulate;
  bool grad_h_n;  // whether h_n of the first layer has a gradient too
  size_t l2_bytes;
  bool grad_cells;  // whether the last cell states of both layers have gradients
  int64_t heads;

  int64_t gate_rows() const { return cell->gates * H; }
  // Returns the number of elements of a layer's parameter; 0 if the layer lacks the parameter. In
  // the first layer, a token table replaces weight_ih.
  int64_t size_of(int parameter, int layer) const {
    switch (parameter) {
      case kWeightIh:
        return (layer == 0 ? V : H) * gate_rows();
      case kWeightHh:
        return cell->has_weight_hh * (H / heads) * gate_rows();
      case kBiasIh:
        return bias * gate_rows();
      case kBiasHh:
        return bias && cell->has_weight_hh ? gate_rows() : 0;
      default:
        return parameter >= kOwn + cell->own ? 0
               : parameter >= kOwn           ? cell->own_blocks[parameter - kOwn] * H
                                             : 0;
    }
  }
};

// Draws sequences of ids, longest first. Some sequences share a prefix, and some are equal.
Sequences draw_sequences(const Problem& p, Random& random) {
  Sequences sequences(p.B);
  for (int64_t b = 0; b < p.B; ++b) {
    std::vector<int64_t>& ids = sequences[b];
    if (b > 0 && random.below(3) == 0) ids = sequences[random.below(b)];
    const bool is_copy = !ids.empty() && random.below(2) == 0;
    const int64_t length = is_copy ? int64_t(ids.size()) : b == 0 ? p.T : 1 + random.below(p.T);
    if (!is_copy) ids.resize(std::min(int64_t(ids.size()), random.below(length)));
    while (int64_t(ids.size()) < length) ids.push_back(random.below(p.V));
  }
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const auto& a, const auto& b) { return a.size() > b.size(); });
  return sequences;
}

// The rows of sequences, either separate for each sequence or shared in a tree.
struct RowLayout {
  std::vector<int64_t> count, start, ids, parent, end_start, end_sequence;
  PrefixTree tree{};
  SequenceLayout layout{};

  RowLayout(const Sequences& sequences, int64_t T, bool shared) : count(T), start(T), end_start(1) {
    std::vector<int64_t> row_of(sequences.size());  // each sequence's row at the latest time
    for (int64_t t = 0; t < T; ++t) {
      start[t] = int64_t(ids.size());
      std::map<std::pair<int64_t, int64_t>, int64_t> rows;  // row numbers by parent and id
      std::vector<std::vector<int64_t>> ends;
      for (int64_t b = 0; b < int64_t(sequences.size()); ++b) {
        if (int64_t(sequences[b].size()) <= t) continue;
        const int64_t id = sequences[b][t];
        const std::pair<int64_t, int64_t> place{shared ? t > 0 ? row_of[b] : -1 : b, id};
        const auto [found, is_new] = rows.insert({place, count[t]});
        if (is_new) {
          ++count[t];
          ids.push_back(id);
          parent.push_back(t > 0 ? row_of[b] : -1);  // not read at time 0
          ends.emplace_back();
        }
        row_of[b] = found->second;
        if (int64_t(sequences[b].size()) == t + 1) ends[row_of[b]].push_back(b);
      }
      for (const std::vector<int64_t>& ended : ends) {
        end_sequence.insert(end_sequence.end(), ended.begin(), ended.end());
        end_start.push_back(int64_t(end_sequence.size()));
      }
    }
    layout.T = T;
    layout.B = *std::max_element(count.begin(), count.end());
    layout.N = int64_t(ids.size());
    layout.count = count.data();
    layout.start = start.data();
    tree = {parent.data(), end_start.data(), end_sequence.data()};
    if (shared) layout.tree = &tree;
  }
  RowLayout(const RowLayout&) = delete;
  RowLayout& operator=(const RowLayout&) = delete;
};

template <class Scalar>
struct Results {
  std::vector<Array<Scalar>> last;       // [states], each [2, B, H]
  std::vector<Array<Scalar>> gradients;  // [layers, kParameters]; empty if there is no gradient

  explicit Results(const Problem& p) {
    for (int i = 0; i < p.cell->states; ++i) last.emplace_back(2 * p.B * p.H);
    for (int i = 0; i < 2 * kParameters; ++i) {
      const int parameter = i % kParameters;
      const bool is_copied = parameter == kBiasHh && p.cell->one_bias_gradient;
      gradients.emplace_back(is_copied ? 0 : p.size_of(parameter, i / kParameters));
    }
  }
  bool is_finite() const {
    bool finite = true;
    for (const Array<Scalar>& states : last) finite &= states.is_finite();
    for (const Array<Scalar>& gradient : gradients) finite &= gradient.is_finite();
    return finite;
  }
  bool operator==(const Results& other) const {
    return last == other.last && gradients == other.gradients;
  }
  // Returns whether the gradients are equal up to rounding.
  bool agrees(const Results& other) const {
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!agree(gradients[i], other.gradients[i])) return false;
    }
    return true;
  }
};

// A stack of two layers over the rows of one RowLayout.
template <class Scalar>
class Stack {
 public:
  Stack(const KernelsFor<Scalar>& kernels, const Problem& p, const RowLayout& rows,
        bool packed_before, int64_t threads)
      : kernels_(kernels),
        p_(p),
        rows_(rows),
        packed_before_(packed_before),
        runtime_(runtime_of(threads, p.l2_bytes)),
        ids_(rows.ids),
        outputs_{Array<Scalar>(rows.layout.N * p.H), Array<Scalar>(rows.layout.N * p.H)},
        kept_{Array<Scalar>(rows.layout.N * kept_size()),
              Array<Scalar>(rows.layout.N * kept_size())},
        grad_rows_(rows.layout.N * p.H) {
    for (int i = 0; i < p.cell->states; ++i) grad_last_.emplace_back(2 * p.B * p.H, random_, 0);
    for (int i = 0; i < 2 * kParameters; ++i) {
      const int exponent = i == kWeightIh ? 0 : 2;  // the table is larger than other parameters
      parameters_.emplace_back(p.size_of(i % kParameters, i / kParameters), random_, exponent);
    }
  }

  Results<Scalar> run() {
    Results<Scalar> results(p_);
    for (const Array<Scalar>& gradient : results.gradients) {
      for (int64_t e = 0; p_.accumulate && e < gradient.size(); ++e)
        random_.draw(gradient.data()[e], 0);
    }
    for (int k = 0; k < 2; ++k) run_forward(k, results);
    for (int k = 2; k-- > 0;) run_backward(k, results);
    return results;
  }

 private:
  int64_t kept_size() const { return p_.cell->kept * p_.H; }

  Layer<Scalar> layer_of(int k) const {
    Layer<Scalar> layer{};
    layer.layout = rows_.layout;
    layer.cell = p_.cell;
    layer.H = layer.P = p_.H;
    layer.heads = p_.heads;
    layer.activation = p_.relu ? Activation::relu : Activation::tanh;
    for (int p = 0; p < kParameters; ++p) {
      layer.parameters[p] = parameters_[k * kParameters + p].data_or_null();
    }
    if (k == 0) {
      layer.table = {{ids_.data(), 0, 1}, layer.parameters[kWeightIh], p_.V, nullptr};
      layer.parameters[kWeightIh] = nullptr;
    } else {
      layer.D = p_.H;
      layer.input = {outputs_[0].data(), 0, p_.H};
    }
    // Without batch_invariant, forward_short() would run a single sequence outside a tree, and its
    // results would differ from a tree's in the last bits.
    layer.batch_invariant = p_.B == 1;
    layer.chains = {kChain, kChain};
    return layer;
  }

  Layer<Scalar> maybe_packed(const PanelFormat<Scalar>& format, int k,
                             std::unique_ptr<Guarded>& panels) const {
    return packed_before_ ? with_panels(format, layer_of(k), panels, runtime_) : layer_of(k);
  }

  void run_forward(int k, const Results<Scalar>& results) const {
    std::unique_ptr<Guarded> panels;
    Forward<Scalar> args{};
    args.layer = maybe_packed(kernels_.forward_panels, k, panels);
    args.output = {outputs_[k].data(), 0, p_.H};
    if (p_.cell->kept) args.kept = {kept_[k].data(), 0, kept_size()};
    for (int i = 0; i < p_.cell->states; ++i) {
      args.last[i] = results.last[i].data() + k * p_.B * p_.H;
    }
    kernels_.forward(args, runtime_);
    free_scratch();
  }

  void run_backward(int k, const Results<Scalar>& results) const {
    std::unique_ptr<Guarded> panels;
    Backward<Scalar> args{};
    args.layer = maybe_packed(kernels_.backward_panels, k, panels);
    args.output = {outputs_[k].data(), 0, p_.H};
    if (p_.cell->kept) args.kept = {kept_[k].data(), 0, kept_size()};
    if (k == 0) {
      args.grad_output = {grad_rows_.data(), 0, p_.H};
    } else {
      args.grad_input = {grad_rows_.data(), 0, p_.H};
    }
    const int64_t first = k * p_.B * p_.H;
    for (int i = 0; i < p_.cell->states; ++i) {
      const bool has_grad = i == 0 ? k == 1 || p_.grad_h_n : p_.grad_cells;
      if (has_grad) args.grad_last[i] = {grad_last_[i].data() + first, p_.H, 1};
    }
    args.accumulate_weights = p_.accumulate;
    args.wants_weights = true;
    for (int p = 0; p < kParameters; ++p) {
      args.grads[p] = results.gradients[k * kParameters + p].data_or_null();
    }
    kernels_.backward(args, runtime_);
    free_scratch();
  }

  const KernelsFor<Scalar>& kernels_;
  const Problem& p_;
  const RowLayout& rows_;
  bool packed_before_;
  Runtime runtime_;
  Random random_;
  Array<int64_t> ids_;
  std::vector<Array<Scalar>> grad_last_;  // [states], each [2, B, H]
  Array<Scalar> outputs_[2], kept_[2], grad_rows_;
  std::vector<Array<Scalar>> parameters_;  // [layers, kParameters]; the first is the table
};

template <class Scalar>
const char* error_of(const KernelsFor<Scalar>& kernels, const Problem& p, Random& random) {
  const Sequences sequences = draw_sequences(p, random);
  const RowLayout plain(sequences, p.T, false), tree(sequences, p.T, true);
  if (plain.layout.B != p.B || tree.layout.N > plain.layout.N) return "the layout has extra rows";
  const auto run = [&](const RowLayout& rows, bool packed_before, int64_t threads) {
    return Stack<Scalar>(kernels, p, rows, packed_before, threads).run();
  };
  const Results<Scalar> expected = run(plain, false, 1);
  const Results<Scalar> results = run(tree, false, 1);
  if (!results.is_finite()) return "a result is not finite";
  if (!(results.last == expected.last)) return "a last state differs from plain rows";
  if (!results.agrees(expected)) return "gradients differ from plain rows";
  if (!(run(tree, true, 1) == results)) return "bits differ if panels are packed in advance";
  if (!(run(tree, false, 3) == results)) return "bits differ if threads divide the products";
  return nullptr;
}

template <class Scalar>
void check(const TestedCell& cell, const KernelsFor<Scalar>& kernels) {
  // The shapes include single sequences whose hidden units fill whole vectors, several time blocks,
  // and gradients that accumulate in a separate buffer.
  static const int64_t shapes[][4] = {{1, 1, 1, 1},    {48, 5, 1, 2},   {16, 7, 40, 1},
                                      {7, 6, 3, 2},    {130, 4, 7, 3},  {33, 20, 60, 2},
                                      {16, 9, 300, 5}, {9, 3, 50, 500}, {3, 12, 2500, 4}};
  forced_plan = {1, 1, 0};
  arrival = Arrival::together;
  Random random;
  int runs = 0;
  for (const auto& [H, T, B, V] : shapes) {
    for (unsigned options = 0; options < 4; ++options) {
      const Problem p{&cell,
                      H,
                      T,
                      B,
                      V,
                      options % 2 != 0,
                      random.below(2) != 0,
                      options / 2 != 0,
                      random.below(2) != 0,
                      size_t(random.below(2) ? 1 << 14 : 1 << 22),
                      random.below(2) != 0,
                      cell.has_weight_hh && random.below(2) ? fewest_heads(H) : 1};
      ++runs;
      const char* error = error_of(kernels, p, random);
      if (!error) continue;
      std::fprintf(stderr, "%s, trees, %zu bytes, (H, T, B, V) = (%d, %d, %d, %d), options %u: ",
                   cell.title.c_str(), sizeof(Scalar), int(H), int(T), int(B), int(V), options);
      fail(error);
    }
  }
  std::printf("%s, trees, %zu bytes: %d problems\n", cell.title.c_str(), sizeof(Scalar), runs);
  std::fflush(stdout);
}

}  // namespace

void check_trees(const TestedCell& cell, const Kernels& kernels) {
  check<float>(cell, kernels);
  check<double>(cell, kernels);
}

}  // namespace namernn_fast
