#include "library/tree_passes.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "library/schedule.h"

namespace namernn_fast {
namespace {

// The arguments of a kernel for layer k over one tree. `output` is of the tree's rows in the layer
// before; layer 0 reads token ids.
template <class Scalar>
Layer<Scalar> tree_layer(const Stack& stack, const Tree& tree, int64_t k, const Scalar* output,
                         const Tensor& panels) {
  Layer<Scalar> layer = layer_of<Scalar>(stack, k, 0);
  layer.layout = tree.layout;
  layer.panels = const_data<char>(panels);
  if (k == 0) {
    layer.table.ids = {tree.ids.data(), 0, 1};
  } else {
    layer.input = {output, 0, stack.H};
  }
  return layer;
}

// The weights of all layers in panels, made once for all trees.
template <class Scalar>
std::vector<Tensor> panels_of_layers(const Stack& stack, const PanelFormat<Scalar>& format) {
  std::vector<Tensor> panels;
  for (int64_t k = 0; k < stack.layers; ++k) {
    panels.push_back(panels_for(format, layer_of<Scalar>(stack, k, 0)));
  }
  return panels;
}

// Calls body(worker) for each of `workers`, on a thread each where there are several.
template <class Body>
void for_each_worker(int64_t workers, Body&& body) {
  if (workers == 1) return body(int64_t(0));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(worker);
  });
}

// The rows of one tree among those of all trees, or a workspace for the rows of one tree.
template <class Scalar>
Scalar* tree_rows(const std::optional<Tensor>& of_all, const PrefixTrees& trees, int64_t i,
                  int64_t H, const std::optional<Tensor>& workspace) {
  return of_all ? mutable_data<Scalar>(*of_all) + trees.first_row(i) * H
                : mutable_data<Scalar>(*workspace);
}

template <class Scalar>
void run_forward(const Stack& stack, const PrefixTrees& trees, ForwardTensors& results) {
  const KernelsFor<Scalar>& own = kernels();
  const std::vector<Tensor> panels = panels_of_layers(stack, own.forward_panels);
  const int64_t size = stack.batch.B * stack.H;
  std::atomic<int64_t> next{0};
  for_each_worker(std::min(this_machine().threads, trees.count()), [&](int64_t) {
    std::optional<Tensor> workspaces[2];  // of layers of either parity
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
        args.output = {
            tree_rows<Scalar>(results.outputs[size_t(k)], trees, i, stack.H, workspaces[k % 2]), 0,
            stack.H};
        args.h_n = mutable_data<Scalar>(results.h_n) + k * size;
        own.forward(args, Call(one_thread()).runtime());
        input = args.output.data;
      }
    }
  });
}

// The gradients that one worker sums up over its trees: those of the caller, or some of its own.
std::vector<Tensor> gradients_of(const BackwardTensors& grads, int64_t worker, int32_t dtype) {
  if (worker == 0) return grads.grad_weights;
  std::vector<Tensor> own;
  for (const Tensor& grad : grads.grad_weights) {
    const auto sizes = grad.sizes();
    own.push_back(empty(std::vector<int64_t>(sizes.begin(), sizes.end()), dtype));
  }
  return own;
}

// Sums up a gradient over all workers, in the order of the workers.
template <class Scalar>
void add_workers(const std::vector<std::vector<Tensor>>& grads, int64_t per_direction) {
  for (size_t w = 1; w < grads.size(); ++w) {
    for (size_t i = 0; i < grads[w].size(); ++i) {
      if (per_direction == 4 && i % 4 == 3) continue;  // finish_backward() writes the second bias
      Scalar* sum = mutable_data<Scalar>(grads[0][i]);
      const Scalar* own = const_data<Scalar>(grads[w][i]);
      const int64_t n = grads[w][i].numel();
      for (int64_t e = 0; e < n; ++e) sum[e] += own[e];
    }
  }
}

template <class Scalar>
void run_backward(const Stack& stack, const PrefixTrees& trees, const BackwardTensors& grads) {
  const KernelsFor<Scalar>& own = kernels();
  const std::vector<Tensor> panels = panels_of_layers(stack, own.backward_panels);
  const std::optional<Tensor> grad_h_n =
      grads.grad_h_n ? std::optional<Tensor>(dense(*grads.grad_h_n)) : std::nullopt;
  const int64_t lowest = std::find(grads.want_weights.begin(), grads.want_weights.end(), true) -
                         grads.want_weights.begin();
  const int64_t H = stack.H;
  const int64_t workers = std::min(this_machine().threads, trees.count());
  std::vector<std::vector<Tensor>> sums;
  for (int64_t w = 0; w < workers; ++w) sums.push_back(gradients_of(grads, w, stack.dtype));

  for_each_worker(workers, [&](int64_t w) {
    std::optional<Tensor> workspaces[2];  // of gradients of the outputs of layers of either parity
    for (int64_t k = 0; k < 2 && stack.layers > 1; ++k) {
      workspaces[k] = empty({trees.most_rows(), H}, stack.dtype);
    }
    Tree tree;
    const int64_t first = trees.count() * w / workers;
    for (int64_t i = first; i < trees.count() * (w + 1) / workers; ++i) {
      trees.build(i, tree);
      const auto output = [&](int64_t k) {
        return const_data<Scalar>(grads.outputs[size_t(k)]) + trees.first_row(i) * H;
      };
      for (int64_t k = stack.layers; k-- > lowest;) {
        Backward<Scalar> args{};
        args.layer =
            tree_layer<Scalar>(stack, tree, k, k ? output(k - 1) : nullptr, panels[size_t(k)]);
        args.output = {output(k), 0, H};
        if (k + 1 < stack.layers) {
          args.grad_output = {const_data<Scalar>(*workspaces[(k + 1) % 2]), 0, H};
        }
        if (k > lowest) args.grad_input = {mutable_data<Scalar>(*workspaces[k % 2]), 0, H};
        if (grad_h_n) {
          args.grad_h_n = const_data<Scalar>(*grad_h_n) + k * stack.batch.B * H;
          args.grad_h_n_stride = H;
          args.grad_h_n_feature_stride = 1;
        }
        if (grads.want_weights[size_t(k)]) {
          const Tensor* own_grads = &sums[size_t(w)][size_t(k * stack.per_direction)];
          args.grad_weight_ih = mutable_data<Scalar>(own_grads[0]);
          args.grad_weight_hh = mutable_data<Scalar>(own_grads[1]);
          if (stack.per_direction == 4) args.grad_bias = mutable_data<Scalar>(own_grads[2]);
          args.accumulate_weights = i > first;
        }
        own.backward(args, Call(one_thread()).runtime());
      }
    }
  });
  add_workers<Scalar>(sums, stack.per_direction);
}

// Calls run(Scalar()) for the type of a stack, which is float or double.
template <class Run>
void with_scalar(const Stack& stack, Run&& run) {
  with_storage(stack.dtype, [&](auto storage) {
    if constexpr (std::is_floating_point_v<decltype(storage)>) run(storage);
  });
}

}  // namespace

std::optional<PrefixTrees> trees_of(const Stack& stack, const Options& options) {
  if (!options.share_prefixes || stack.batch.layout.N == 0) return std::nullopt;
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
