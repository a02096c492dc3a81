#include "library/passes/tree_passes.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "arithmetic.h"
#include "library/passes/schedule.h"

namespace namernn_fast {
namespace {

// Returns a kernel's arguments for layer k over one tree. `output` points to the previous layer's
// output for the tree's rows; layer 0 reads token ids instead.
template <class Scalar>
Layer<Scalar> tree_layer(const Stack& stack, const Tree& tree, int64_t k, const Scalar* output,
                         const std::optional<Tensor>& panels) {
  Layer<Scalar> layer = layer_of<Scalar>(stack, k, 0);
  layer.layout = tree.layout;
  if (panels) layer.panels = const_data<char>(*panels);
  if (k == 0) {
    layer.table.ids = {tree.ids.data(), 0, 1};
  } else {
    layer.input = {output, 0, stack.H};
  }
  return layer;
}

// Returns each layer's weights packed into panels, which all trees share. The panels are absent if
// the layers are prepared and so have panels already.
template <class Scalar>
std::vector<std::optional<Tensor>> panels_of_layers(const Stack& stack,
                                                    const PanelFormat<Scalar>& format) {
  std::vector<std::optional<Tensor>> panels(size_t(stack.layers));
  for (int64_t k = 0; k < stack.layers; ++k) {
    Layer<Scalar> layer = layer_of<Scalar>(stack, k, 0);
    use_panels(format, layer, panels[size_t(k)]);
  }
  return panels;
}

// Calls body(worker) for each of `workers` workers, in parallel if there are several workers.
template <class Body>
void for_each_worker(int64_t workers, Body&& body) {
  if (workers == 1) return body(int64_t(0));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
  });
}

// Returns tree i's rows in `all_rows`, which holds the rows of all trees. If `all_rows` is absent,
// returns `workspace`, which is large enough for any tree.
template <class Scalar>
Scalar* tree_rows(const std::optional<Tensor>& all_rows, const PrefixTrees& trees, int64_t i,
                  int64_t H, const std::optional<Tensor>& workspace) {
  return all_rows ? mutable_data<Scalar>(*all_rows) + trees.first_row(i) * H
                  : mutable_data<Scalar>(*workspace);
}

template <class Scalar>
void run_forward(const Stack& stack, const PrefixTrees& trees, ForwardTensors& results) {
  const KernelsFor<Scalar>& kernels = kernels_in<Scalar>();
  const std::vector<std::optional<Tensor>> panels = panels_of_layers(stack, kernels.forward_panels);
  std::optional<Tensor> table;
  Layer<Scalar> first = layer_of<Scalar>(stack, 0, 0);
  use_biased_table(stack, first, table);
  const int64_t size = stack.batch.B * stack.H;
  std::atomic<int64_t> next{0};
  for_each_worker(std::min(this_machine().threads, trees.count()), [&](int64_t) {
    std::optional<Tensor> workspaces[2];  // for the outputs of even and odd layers
    for (int64_t k = 0; k < std::min<int64_t>(2, stack.layers) && !results.outputs[0]; ++k) {
      workspaces[k] = empty({trees.most_rows(), stack.H}, stack.dtype);
    }
    Tree tree;
    for (int64_t i; (i = next++) < trees.count();) {
      trees.build(i, tree);
      const Scalar* input = nullptr;
      for (int64_t k = 0; k < stack.layers; ++k) {
        Forward<Scalar> args{};
        args.layer = tree_layer<Scalar>(stack, tree, k, input, panels[size_t(k)]);
        use_biased_table(stack, args.layer, table);
        args.output = {
            tree_rows<Scalar>(results.outputs[size_t(k)], trees, i, stack.H, workspaces[k % 2]), 0,
            stack.H};
        if (!results.kept.empty()) {
          const int64_t row = stack.kept_size();
          args.kept = {mutable_data<Scalar>(results.kept[size_t(k)]) + trees.first_row(i) * row, 0,
                       row};
        }
        for (size_t n = 0; n < results.last_states.size(); ++n) {
          args.last[n] = mutable_data<Scalar>(results.last_states[n]) + k * size;
        }
        kernels.forward(args, Resources(one_thread()).runtime());
        input = args.output.data;
      }
    }
  });
}

// Parameter gradients that one worker sums over its trees. For accuracy, the gradients of many rows
// accumulate in a separate buffer before they join the sums, as in gradient_sums.h. A kernel cannot
// use such a buffer itself, because it sees only one tree.
template <class Scalar>
class WorkerGradients {
 public:
  // `rows` is the number of rows in the worker's trees. The first worker sums directly into
  // grads.grad_weights.
  WorkerGradients(const Stack& stack, const BackwardTensors& grads, bool first, int64_t rows)
      : sums_(first ? grads.grad_weights : like(grads.grad_weights)),
        parameters_(stack.parameters),
        copied_bias_(stack.cell->one_bias_gradient) {
    if (rows <= 2 * kRowsApart) return;
    apart_ = like(grads.grad_weights);
    for (const Tensor& grad : apart_) {
      std::fill_n(mutable_data<Scalar>(grad), grad.numel(), Scalar());
    }
  }

  // Returns the tensors to which the next kernel call writes its gradients.
  const std::vector<Tensor>& place() const { return is_apart_ ? apart_ : sums_; }
  // Returns whether the next kernel call adds to the gradients in place() instead of overwriting
  // them.
  bool accumulate() const { return is_apart_ || rows_ > 0; }

  // Counts the rows of a tree whose gradients have been written to place().
  void count(int64_t rows) {
    rows_ += rows;
    if (apart_.empty() || rows_ < kRowsApart) return;
    if (is_apart_) add_apart();
    is_apart_ = true;
    rows_ = 0;
  }

  // Completes the sums after the last tree.
  void finish() {
    if (is_apart_) add_apart();
  }

  // Adds the sums of `other`. Call other.finish() first.
  void add(const WorkerGradients& other) {
    for_each_sum([&](size_t i, Scalar* sums, int64_t n) {
      const Scalar* added = const_data<Scalar>(other.sums_[i]);
      for (int64_t e = 0; e < n; ++e) sums[e] += added[e];
    });
  }

 private:
  static std::vector<Tensor> like(const std::vector<Tensor>& tensors) {
    std::vector<Tensor> made;
    for (const Tensor& tensor : tensors) made.push_back(uninitialized_like(tensor));
    return made;
  }

  // Calls f(i, sums, n) for each gradient i, with n elements starting at `sums`. Skips the gradient
  // of bias_hh if it is a copy.
  template <class F>
  void for_each_sum(F&& f) {
    for (size_t i = 0; i < sums_.size(); ++i) {
      const Parameter parameter = parameters_.roles[i % size_t(parameters_.count)];
      if (copied_bias_ && parameter == kBiasHh) continue;
      f(i, mutable_data<Scalar>(sums_[i]), sums_[i].numel());
    }
  }

  // Adds apart_ to sums_ and leaves the rounding errors in apart_.
  void add_apart() {
    for_each_sum([&](size_t i, Scalar* sums, int64_t n) {
      Scalar* apart = mutable_data<Scalar>(apart_[i]);
      for (int64_t e = 0; e < n; ++e) add_keeping_error(sums[e], apart[e]);
    });
  }

  std::vector<Tensor> sums_;
  std::vector<Tensor> apart_;  // not yet added to sums_; empty if kernels always write to sums_
  ParameterList parameters_;   // parameters of each direction
  bool copied_bias_;           // whether finish_backward() copies the gradient of bias_hh
  bool is_apart_ = false;      // whether the next rows' gradients accumulate in apart_
  int64_t rows_ = 0;           // number of rows since apart_ was last added to sums_
};

template <class Scalar>
void run_backward(const Stack& stack, const PrefixTrees& trees, const BackwardTensors& grads) {
  const KernelsFor<Scalar>& kernels = kernels_in<Scalar>();
  const std::vector<std::optional<Tensor>> panels =
      panels_of_layers(stack, kernels.backward_panels);
  std::vector<std::optional<Tensor>> grad_last_states;
  for (const std::optional<Tensor>& grad : grads.grad_last_states) {
    grad_last_states.push_back(grad ? std::optional<Tensor>(dense(*grad)) : std::nullopt);
  }
  const int64_t lowest = std::find(grads.want_weights.begin(), grads.want_weights.end(), true) -
                         grads.want_weights.begin();
  const int64_t H = stack.H;
  const int64_t workers = std::min(this_machine().threads, trees.count());
  const auto first_tree = [&](int64_t worker) { return trees.count() * worker / workers; };
  std::vector<WorkerGradients<Scalar>> sums;
  for (int64_t w = 0; w < workers; ++w) {
    const int64_t rows = trees.first_row(first_tree(w + 1)) - trees.first_row(first_tree(w));
    sums.emplace_back(stack, grads, w == 0, rows);
  }

  for_each_worker(workers, [&](int64_t w) {
    std::optional<Tensor> workspaces[2];  // for the input gradients of even and odd layers
    for (int64_t k = 0; k < 2 && stack.layers > 1; ++k) {
      workspaces[k] = empty({trees.most_rows(), H}, stack.dtype);
    }
    Tree tree;
    for (int64_t i = first_tree(w); i < first_tree(w + 1); ++i) {
      trees.build(i, tree);
      const auto output = [&](int64_t k) {
        return const_data<Scalar>(grads.outputs[size_t(k)]) + trees.first_row(i) * H;
      };
      for (int64_t k = stack.layers; k-- > lowest;) {
        Backward<Scalar> args{};
        args.layer =
            tree_layer<Scalar>(stack, tree, k, k ? output(k - 1) : nullptr, panels[size_t(k)]);
        args.output = {output(k), 0, H};
        if (!grads.kept.empty()) {
          const int64_t row = stack.kept_size();
          args.kept = {const_data<Scalar>(grads.kept[size_t(k)]) + trees.first_row(i) * row, 0,
                       row};
        }
        if (k + 1 < stack.layers) {
          args.grad_output = {const_data<Scalar>(*workspaces[(k + 1) % 2]), 0, H};
        }
        if (k > lowest) args.grad_input = {mutable_data<Scalar>(*workspaces[k % 2]), 0, H};
        for (size_t n = 0; n < grad_last_states.size(); ++n) {
          args.grad_last[n] = gradients_of<Scalar>(grad_last_states[n], k);
        }
        if (grads.want_weights[size_t(k)]) {
          const std::vector<Tensor>& place = sums[size_t(w)].place();
          set_weight_gradients(stack, &place[stack.first_weight(k)], args);
          args.accumulate_weights = sums[size_t(w)].accumulate();
        }
        kernels.backward(args, Resources(one_thread()).runtime());
      }
      sums[size_t(w)].count(trees.rows(i));
    }
    sums[size_t(w)].finish();
  });
  for (int64_t w = 1; w < workers; ++w) sums[0].add(sums[size_t(w)]);
}

// Calls run(Scalar()), where Scalar is the stack's type. The type must be float or double.
template <class Run>
void with_scalar(const Stack& stack, Run&& run) {
  with_storage(stack.dtype, [&](auto storage) {
    if constexpr (std::is_floating_point_v<decltype(storage)>) run(storage);
  });
}

}  // namespace

std::optional<PrefixTrees> trees_of(const Stack& stack, const Options& options) {
  if (!options.share_prefixes || stack.is_empty()) return std::nullopt;
  PrefixTrees trees(stack.batch, stack.input, stack.V, options.trees);
  if (!trees.are_worthwhile()) return std::nullopt;
  return trees;
}

void forward_trees(const Stack& stack, const PrefixTrees& trees, ForwardTensors& results) {
  with_scalar(stack, [&](auto scalar) { run_forward<decltype(scalar)>(stack, trees, results); });
}

void backward_trees(const Stack& stack, const PrefixTrees& trees, const BackwardTensors& grads) {
  with_scalar(stack, [&](auto scalar) { run_backward<decltype(scalar)>(stack, trees, grads); });
}

}  // namespace namernn_fast
