// Schedules layers and directions. They run one after the other on all threads, or concurrently on
// one thread each.
#pragma once

#include <atomic>
#include <numeric>
#include <optional>
#include <vector>

#include "library/arguments/stack.h"
#include "library/base/runtime.h"
#include "plan.h"
#include "processor.h"
#include "wait.h"

namespace namernn_fast {

// Returns the arguments for choosing the plan of a layer with D input features.
inline PlanArguments plan_arguments_of(Pass pass, const Stack& stack, const Machine& machine,
                                       int64_t D) {
  const bool is_double = stack.dtype == aoti_torch_dtype_float64();
  return {pass,
          stack.batch.layout,
          machine,
          D,
          stack.H,
          panels_to_split(*stack.cell, pass == Pass::backward, stack.H, stack.heads,
                          kernels().panel_width),
          is_double ? sizeof(double) : sizeof(float),
          stack.cell->gates,
          is_double ? 0.5 : 1.0,
          recurrent_size(*stack.cell, stack.H, stack.H, stack.heads)};
}

// Calls run(direction, resources) for each direction. Runs both directions concurrently, on one
// thread each, if they are `independent` and this is estimated to be faster. Otherwise, runs one
// direction after the other on all threads.
template <class Run>
void run_directions(const Stack& stack, int64_t D, bool independent, Run&& run) {
  const Machine machine = this_machine();
  if (independent && stack.directions == 2 &&
      choose_both_at_once(plan_arguments_of(Pass::forward, stack, machine, D))) {
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t d = begin; d < end; ++d) run(d, Resources(one_thread()));
    });
    return;
  }
  for (int64_t d = 0; d < stack.directions; ++d) run(d, Resources(machine));
}

// The time steps of a batch, split into consecutive stretches.
class Stretches {
 public:
  Stretches(const SequenceLayout& layout, int64_t length) : layout_(layout), length_(length) {
    if (!layout.start) return;
    start_.resize(size_t(layout.T));
    for (int64_t t = 0; t < layout.T; ++t) {
      start_[size_t(t)] = layout.start[t] - layout.start[t / length * length];
    }
  }

  int64_t count() const { return (layout_.T + length_ - 1) / length_; }

  // Restricts `layer` to stretch i. The stretch's initial h is the output at the previous time
  // step. The layer must not be reversed.
  template <class Scalar>
  void select(int64_t i, Layer<Scalar>& layer, const RowStrides<const Scalar>& output) const {
    const int64_t first = i * length_;
    if (first > 0) {
      layer.initial[0] = {row(output, first - 1).data, output.row_stride};
    }
    layer.input = row(layer.input, first);
    layer.table.ids = row(layer.table.ids, first);
    for (auto& rows : layer.inputs) rows = row(rows, first);
    if (layer.resets.at) layer.resets.at += first * layer.resets.time_stride;
    for (auto& states : layer.reset_to) states = from(i, states);
    SequenceLayout& stretch = layer.layout;
    stretch.T = std::min(length_, layout_.T - first);
    if (layout_.count) {
      stretch.B = layout_.count[first];
      stretch.count = layout_.count + first;
      stretch.N = std::accumulate(stretch.count, stretch.count + stretch.T, int64_t(0));
    } else {
      stretch.N = stretch.T * stretch.B;
    }
    if (layout_.start) stretch.start = start_.data() + first;
  }

  // Returns `rows` shifted so that time t becomes time 0.
  template <class Scalar>
  RowStrides<Scalar> row(RowStrides<Scalar> rows, int64_t t) const {
    if (rows.data) {
      rows.data += layout_.start ? layout_.start[t] * rows.row_stride : t * rows.time_stride;
    }
    return rows;
  }
  // Returns `rows` shifted so that stretch i starts at time 0.
  template <class Scalar>
  RowStrides<Scalar> from(int64_t i, const RowStrides<Scalar>& rows) const {
    return row(rows, i * length_);
  }
  // Returns `states` shifted so that stretch i starts at time 0.
  template <class Scalar>
  RestartStates<Scalar> from(int64_t i, RestartStates<Scalar> states) const {
    if (states.data) states.data += i * length_ * states.time_stride;
    return states;
  }

 private:
  SequenceLayout layout_;
  int64_t length_;
  std::vector<int64_t> start_;  // [T]: number of rows before each time in its stretch
};

// Calls body(n, i) for every stretch i of every layer n. A stretch runs after the previous stretch
// of its layer and after the same stretch of the previous layer. Threads cannot deadlock: they take
// layers in order, so the layer that a thread waits for has finished or is running on another
// thread.
template <class Body>
void run_wave(int64_t at_once, int64_t layers, int64_t stretches, Body&& body) {
  std::vector<Signal> progress(static_cast<size_t>(layers));  // finished stretches per layer
  std::atomic<int64_t> next{0};
  const Runtime runtime = Resources(one_thread()).runtime();
  torch::stable::parallel_for(0, at_once, 1, [&](int64_t, int64_t) {
    for (int64_t n; (n = next++) < layers;) {
      Signal& done = progress[size_t(n)];
      try {
        for (int64_t i = 0; i < stretches; ++i) {
          if (n > 0) {
            wait_until(progress[size_t(n - 1)], runtime, kForEver,
                       [&](uint32_t finished) { return int64_t(finished) > i; });
          }
          body(n, i);
          announce(done, uint32_t(i + 1), runtime);
        }
      } catch (...) {
        announce(done, uint32_t(stretches), runtime);
        throw;
      }
    }
  });
}

inline Wave wave_of(const Stack& stack, Pass pass) {
  const bool one_way = stack.directions == 1;
  // A stretch reads its initial states as evenly spaced rows of `output`, but in a jagged tensor
  // the rows at one time are not evenly spaced.
  const bool evenly_spaced = stack.batch.kind != Batch::Kind::jagged;
  // In 16 bits, a wave would round the states that one stretch passes to the next.
  const bool exact =
      stack.terms == 0 && !stack.int8 &&
      (stack.dtype == aoti_torch_dtype_float32() || stack.dtype == aoti_torch_dtype_float64());
  if (!one_way || !evenly_spaced || !exact || stack.layers == 1 || stack.is_empty()) {
    return {1, stack.batch.layout.T};
  }
  const PlanArguments arguments = plan_arguments_of(pass, stack, this_machine(), stack.H);
  return choose_wave(arguments, stack.layers);
}

// Returns a layer's weights packed into panels, which several kernel calls can share.
template <class Scalar>
Tensor panels_for(const PanelFormat<Scalar>& format, const Layer<Scalar>& layer) {
  const Tensor panels = empty({int64_t(format.bytes(layer))}, aoti_torch_dtype_uint8());
  format.pack(layer, mutable_data<char>(panels), Resources(one_thread()).runtime());
  return panels;
}

// Makes `layer` use `panels`, unless the layer is prepared and so has panels already. The first
// call packs the weights into `panels`.
template <class Scalar>
void use_panels(const PanelFormat<Scalar>& format, Layer<Scalar>& layer,
                std::optional<Tensor>& panels) {
  if (layer.panels) return;
  if (!panels) panels = panels_for(format, layer);
  layer.panels = mutable_data<char>(*panels);
}

// Replaces the layer's table with `biased`, a copy that includes the layer's biases. The first call
// makes the copy. All stretches of a wave, or all trees, share this copy; otherwise every kernel
// call would add the biases again.
template <class Scalar>
void use_biased_table(const Stack& stack, Layer<Scalar>& layer, std::optional<Tensor>& biased) {
  if (!layer.table.rows || layer.table.biased || !layer.parameters[kBiasIh]) return;
  if (!biased) {
    const KernelsFor<Scalar>& kernels = kernels_in<Scalar>();
    biased = empty({layer.table.V, stack.gate_rows()}, stack.dtype);
    kernels.add_biases(layer, mutable_data<Scalar>(*biased), Resources(one_thread()).runtime());
  }
  layer.table.rows = const_data<Scalar>(*biased);
  layer.parameters[kBiasIh] = layer.parameters[kBiasHh] = nullptr;
}

}  // namespace namernn_fast
