// Defines the data of one part of the forward pass: its plan, weights, table and memory.
#pragma once

#include "kernel/products/product_in_place.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

// Returns whether the sums are computed in the output rows, where the states then overwrite them.
template <class Storage>
inline bool are_sums_in_output(const Layer<Storage>& layer) {
  const Cell& cell = *layer.cell;
  return cell.sums == 1 && cell.only_through_sums && cell.has_weight_hh && layer.P == layer.H &&
         layer.heads == 1 && !layer.sums_given && !cell.states_need_rows;
}

// A range of times, first .. last.
struct TimeRange {
  int64_t first;
  int64_t last;
};

template <class Storage>
inline PlanArguments plan_arguments(const Layer<Storage>& layer, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  constexpr double speed = sizeof(float) / double(sizeof(Scalar));
  return arguments_of_plan(Pass::forward, layer, runtime, sizeof(Scalar), speed);
}

template <class Storage>
inline Plan forward_plan(const Layer<Storage>& layer, const Runtime& runtime) {
  return choose_plan(plan_arguments(layer, runtime));
}

// The weights that a part reads, and a zero state. Panels have elements of type Element.
template <class Scalar, class Storage, class Element = Scalar>
struct ForwardWeights {
  const Element* weights;    // panels, as in ForwardPanels
  const Scalar* bias;        // as in ForwardPanels
  Own<Scalar> own;           // as in ForwardPanels
  const Element* weight_hr;  // as in ForwardPanels
  bool finite;               // whether the part's columns of weight_hh are known to be finite
  const Scalar* zeros;       // [P], the initial state if none is given
  const Storage* weight_ih;  // the caller's weight_ih; null unless it is read in place
  const Storage* weight_hh;  // the caller's weight_hh; null unless it is read in place
  bool prefetch;             // whether to prefetch panels if every step reads all weights
  bool prefetch_hh;          // whether to prefetch panels if every step reads only weight_hh
};

// Memory shared by all parts. Each array is null if the layer does not need it.
template <class Scalar>
struct ForwardMemory {
  const Scalar* table;  // [V, H], the rows of the token table plus the biases
  // [members, B]: pointers to the rows of `table` from which the sums of a step start.
  const Scalar** looked_up;
  int64_t B;  // number of sequences in the whole batch, even if args cover only one time block
  Scalar* unprojected;  // [B, H], h of the current step before its projection
  Scalar* continued;    // [B, H], in a tree: copies of the previous h of a step's rows
  // [B, H] each, in a tree: each cell state of rows at even and at odd times.
  Scalar* cell_states[2][kMostStates];
  // [groups, projected_rows, gates * H]: the projection, if computed ahead and not in the output.
  Scalar* projected;
  int64_t projected_rows;  // number of rows per group in `projected`
  // [groups, sum_rows, sum_stride]: whole rows of sums, if the cell needs them.
  Scalar* sums;
  int64_t sum_rows;
  int64_t sum_stride;
  EvenRows<Scalar> row_registers;  // [groups]: StateRows::row_registers
};

// Writes a layer's table plus the biases to `result`, in the type that kernels compute in. Skips
// blocks of bias_hh that belong to sums without an input contribution, such as b_hn of a GRU.
template <class Storage>
inline void add_biases(const Layer<Storage>& layer, void* result, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  Scalar* table = static_cast<Scalar*>(result);
  const int64_t V = layer.table.V;
  const Cell& cell = *layer.cell;
  const int64_t H = layer.H;
  const int64_t width = cell.gates * H;
  const Storage *bias_ih = layer.parameters[kBiasIh], *bias_hh = layer.parameters[kBiasHh];
  const int64_t workers = choose_workers(kAddingCost * double(V) * double(width), runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t v = V * begin / workers; v < V * end / workers; ++v) {
      for (int64_t s = 0; s < cell.gates; ++s) {
        const int64_t first = cell.input_block[s] * H;
        const Storage* row = layer.table.rows + v * width + first;
        const int64_t state_block = s - cell.first_state_sum;
        for_each_vector<Scalar>(H, [&](int64_t j, int64_t n) {
          Vec<Scalar> sum = load_upto(row + j, n);
          if (bias_ih) sum += load_upto(bias_ih + first + j, n);
          if (bias_hh && state_block >= 0) sum += load_upto(bias_hh + state_block * H + j, n);
          store_upto(table + v * width + first + j, sum, n);
        });
      }
    }
  });
}

// Returns a layer's table plus the biases, in the type that kernels compute in.
template <class Storage, class Scalar = Compute<Storage>>
inline const Scalar* biased_table(const Layer<Storage>& layer, const Runtime& runtime) {
  if (layer.table.biased) return static_cast<const Scalar*>(layer.table.biased);
  if constexpr (std::is_same_v<Storage, Scalar>) {
    if (!layer.parameters[kBiasIh] && !layer.parameters[kBiasHh]) return layer.table.rows;
  }
  Scalar* table = scratch<Scalar>(runtime, layer.table.V * layer.cell->gates * layer.H);
  add_biases(layer, table, runtime);
  return table;
}

template <class Storage, class Scalar = Compute<Storage>>
inline ForwardMemory<Scalar> forward_memory(const Layer<Storage>& layer, const Plan& plan,
                                            const Runtime& runtime) {
  ForwardMemory<Scalar> memory{};
  memory.B = layer.layout.B;
  if (projected_size(layer)) memory.unprojected = scratch<Scalar>(runtime, memory.B * layer.H);
  if (layer.layout.tree) {
    memory.continued = scratch<Scalar>(runtime, layer.layout.B * layer.H);
    for (int i = 1; i < layer.cell->states; ++i) {
      for (auto& states : memory.cell_states) {
        states[i] = scratch<Scalar>(runtime, layer.layout.B * layer.H);
      }
    }
  }
  if (!are_sums_in_output(layer) && layer.D > 0) {
    memory.projected_rows = choose_projected_rows(plan_arguments(layer, runtime));
    for (int64_t g = 0; g < plan.groups; ++g) {
      const Slice slice = slice_of(layer.layout, g, plan.groups);
      memory.projected_rows = max64(memory.projected_rows, slice.end - slice.begin);
    }
    memory.projected =
        scratch<Scalar>(runtime, plan.groups * memory.projected_rows * layer.cell->gates * layer.H);
  }
  if (layer.cell->states_need_rows) {
    constexpr int64_t w = Shape<Scalar>::panel_width;
    // The stride is no power of two, so that the rows of a tile are in different cache sets.
    memory.sum_stride = panel_count<Scalar>(layer.H) * layer.cell->sums * w + w;
    memory.sum_rows = choose_whole_rows(plan_arguments(layer, runtime),
                                        memory.sum_stride * int64_t(sizeof(Scalar)));
    memory.sums = scratch<Scalar>(runtime, plan.groups * memory.sum_rows * memory.sum_stride);
    memory.row_registers = row_registers<Scalar>(layer, false, plan.groups, runtime);
  }
  if (!has_table(layer)) return memory;
  memory.looked_up = static_cast<const Scalar**>(
      runtime.scratch(size_t(plan.members * layer.layout.B) * sizeof(const Scalar*)));
  memory.table = biased_table(layer, runtime);
  return memory;
}

// Returns how many steps of a slice to project at once: `wanted`, or fewer if memory.projected is
// too small.
template <class Scalar>
inline int64_t fit_projected_steps(int64_t wanted, const ForwardMemory<Scalar>& memory,
                                   Slice slice) {
  if (!memory.projected || wanted == 0) return wanted;
  return max64(1, min64(wanted, memory.projected_rows / max64(1, slice.end - slice.begin)));
}

template <class Element, class Storage, class Scalar>
inline ForwardWeights<Scalar, Storage, Element> forward_weights(const Part& part,
                                                                const Layer<Storage>& layer,
                                                                const WeightCopies& copies,
                                                                const Scalar* zeros,
                                                                const Machine& machine) {
  const auto panels = weights_for<ForwardPanels<Storage, Element>>(part, layer, copies);
  bool finite = true;
  const int64_t width = part.columns.last - part.columns.first;
  const int64_t row_bytes = layer.cell->gates * width * int64_t(sizeof(Element));
  for (int64_t j = part.columns.first; j < part.columns.last; j += panels.w) {
    finite &= panels.finite[j / panels.w] != 0;
  }
  return {panels.weights,
          panels.bias,
          panels.own,
          panels.weight_hr,
          finite,
          zeros,
          layer.in_place.weight_ih ? layer.parameters[kWeightIh] : nullptr,
          layer.in_place.weight_hh ? layer.parameters[kWeightHh] : nullptr,
          leave_cache((layer.D + recurrent_size(layer)) * row_bytes, machine),
          leave_cache(recurrent_size(layer) * row_bytes, machine)};
}

// The data of one part (a slice of the sequences and a range of hidden units), with functions that
// locate the part's rows and operands. Weights that are read in place have elements of type
// Storage.
template <class Scalar, class Storage, class Element>
struct ForwardContext {
  static constexpr int64_t w = Shape<Scalar>::panel_width;

  const Forward<Scalar>& args;
  const ForwardWeights<Scalar, Storage, Element>& weights;
  const Part& part;
  const ForwardMemory<Scalar>& memory;
  // Number of steps projected at once, ahead of the recurrence; 0 if each step projects its inputs.
  int64_t projected_steps;
  bool prefetch_rows;  // whether each step prefetches the next step's rows; read by OutputSums

  int64_t panel_size() const {
    return ForwardPanels<Storage, Element>::unit_block_size(args.layer);
  }

  // Return the operands of the input and state products, starting with weight block 0.
  // Operand::after is the part's first unit block, which the part reads again after its last one.
  Operand<Scalar, Element> projection(const Scalar* x, int64_t stride) const {
    return operand(x, stride, weights.weights, args.layer.D, args.layer.chains.projection,
                   weights.prefetch);
  }
  Operand<Scalar, Element> recurrence(const Scalar* h, int64_t stride) const {
    return operand(h, stride, weights.weights + args.layer.D * w, recurrent_size(args.layer),
                   args.layer.chains.recurrence,
                   projected_steps ? weights.prefetch_hh : weights.prefetch);
  }
  Operand<Scalar, Element> operand(const Scalar* a, int64_t stride, const Element* panels,
                                   int64_t K, int64_t chain, bool prefetch) const {
    const Element* first = panels + part.columns.first / w * panel_size();
    return {a, stride, panels, panel_size(), K, chain, prefetch ? first : nullptr};
  }

  // Returns where a step writes the i-th state of row (t, b): h before its projection, or a cell
  // state. Except in a tree, each step updates a sequence's cell states in place.
  Scalar* state_at(int i, int64_t t, int64_t b) const {
    const SequenceLayout& layout = args.layer.layout;
    if (i == 0 && projected_size(args.layer)) return memory.unprojected + b * args.layer.H;
    if (i == 0) return row_at(args.output, layout, t, b);
    return layout.tree ? memory.cell_states[t % 2][i] + b * args.layer.H
                       : args.last[i] + place_of(layout, b) * args.layer.H;
  }

  // Returns the cell's arguments for rows that start at (t, b), except the sums and the previous h.
  // The other previous states are zeros if `from_zeros`; otherwise they are read from memory.
  StateRows<Scalar> state_rows(int64_t t, int64_t b, bool from_zeros) const {
    const Layer<Scalar>& layer = args.layer;
    const Cell& cell = *layer.cell;
    StateRows<Scalar> rows{};
    rows.H = layer.H;
    rows.activation = layer.activation;
    rows.program = cell.program;
    for (int i = 0; i < cell.states; ++i) {
      const bool in_output = i == 0 && !projected_size(layer);
      rows.states[i] = {state_at(i, t, b), in_output ? args.output.row_stride : layer.H};
      if (i > 0 && !from_zeros) rows.previous[i] = {rows.states[i].data, rows.states[i].stride};
    }
    rows.kept = rows_from(args.kept, layer.layout, t, b, 0);
    for (int i = 0; i < cell.inputs; ++i) {
      rows.inputs[i] = rows_from(layer.inputs[i], layer.layout, t, b, 0);
    }
    weights.own.set(cell, 0, rows);
    return rows;
  }

  // Returns pointers to the table's rows for sequences begin .. end at time t.
  const Scalar* const* look_up(int64_t t, int64_t begin, int64_t end) const {
    const Scalar** rows = memory.looked_up + part.member * memory.B + begin;
    for (int64_t b = begin; b < end; ++b) {
      rows[b - begin] =
          memory.table + token_of(args.layer, t, b) * args.layer.cell->gates * args.layer.H;
    }
    return rows;
  }

  // Calls f(run) for runs that together cover the rows of projected_steps steps, starting at step
  // s. `flat` says whether is_flat() holds for the tensor that receives the projection.
  template <class F>
  void for_each_projected_run(int64_t s, bool flat, F&& f) const {
    const Layer<Scalar>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const auto [first, last] = projected_times(s);
    for_each_run(layout, first, last, part.slice, flat && is_flat(layer.input, layout),
                 !layout.start, f);
  }

  // Returns the times of at most projected_steps steps, starting at step s.
  TimeRange projected_times(int64_t s) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t t = time_of(layer, s);
    const int64_t ahead = time_of(layer, min64(s + projected_steps, layer.layout.T) - 1);
    return {min64(t, ahead), max64(t, ahead) + 1};
  }
};

}  // namespace
}  // namespace namernn_fast
