// Computes the backward recurrence over one time block. Also defines the data of a backward pass.
#pragma once

#include "kernel/backward/float_products.h"
#include "kernel/backward/row_sums.h"

namespace namernn_fast {
namespace {

// The data of the backward pass for one group of sequences.
template <class Products>
struct BackwardGroup {
  using Scalar = typename Products::Scalar;

  GroupRows rows;                  // rows of the part that the group is computing
  GradientSums<Scalar> gradients;  // used only if parameter gradients are wanted
  Products products;
  WeightCopies copies;  // where each group reads the panels of weight_hh and weight_hr
  // Gradients of h [B, P] and of the cell states [B, H] at the current step.
  Scalar* grad[kMostStates];
  // Gradients of the previous states, shaped like `grad`. Equal to `grad`, except in a tree.
  Scalar* grad_previous[kMostStates];
  // [B, H]: gradients of the unprojected h, later overwritten by this h. Null without projection.
  Scalar* unprojected;
  Own<Scalar> own;
  // Gradient accumulators of the cell's own parameters [blocks, H]: [1] for a few rows, [0] for the
  // whole time block.
  Scalar* grad_own[2];
  Scalar* row_registers;  // GradientRows::row_registers
  TokenRows tokens;       // used only if the table's gradient is wanted
  bool one_product;  // whether each weight gradient is a single product, which needs no running sum
};

template <class Products>
struct BackwardPass {
  using Group = BackwardGroup<Products>;

  const Backward<typename Products::Storage>& args;
  const Runtime& runtime;
  Plan plan;
  Team* teams;         // [groups]
  int64_t block_rows;  // approximate number of rows in a time block
  Group* groups;       // [groups]
  int64_t parts;       // number of parts per group; a group runs its parts one after the other
  GroupRows* rows;     // [groups * parts]
};

// Calls f(part) for each part of a group. If the group has several parts, skips empty parts. All
// parts accumulate into the same gradient sums.
template <class Products, class F>
inline void for_each_part(const BackwardPass<Products>& pass, int64_t group, F&& f) {
  BackwardGroup<Products> part = pass.groups[group];
  for (int64_t p = group * pass.parts; p < (group + 1) * pass.parts; ++p) {
    part.rows = pass.rows[p];
    if (pass.parts > 1 && part.rows.slice.begin == part.rows.slice.end) continue;
    f(part);
    part.gradients.accumulate = true;
    part.copies.packed = true;
  }
}

// Copies this part of the gradient of the i-th last state into `grad`. Writes zeros if
// grad_last.data is null.
template <class Storage, class Scalar>
inline void read_last_gradients(const Layer<Storage>& layer, int i,
                                const StateGradients<Storage>& grad_last, const Part& part,
                                Scalar* grad) {
  const int64_t first = part.of_state(i).first;
  const int64_t width = part.of_state(i).last - first;
  const int64_t stride = grad_last.feature_stride;
  for (int64_t b = part.slice.begin; b < part.slice.end; ++b) {
    Scalar* grad_row = grad + b * size_of_state(layer, i) + first;
    if (!grad_last.data) {
      fill_zeros(grad_row, width);
      continue;
    }
    const Storage* from =
        grad_last.data + place_of(layer.layout, b) * grad_last.stride + first * stride;
    for (int64_t j = 0; stride != 1 && j < width; ++j) convert(from + j * stride, grad_row + j, 1);
    if (stride == 1) convert(from, grad_row, width);
  }
}

// Sets `columns` of a row to zero.
template <class Scalar>
inline void clear(Scalar* row, Columns columns) {
  fill_zeros(row + columns.first, columns.last - columns.first);
}

// Sets `grad` to the gradients of h, or of a cell state, for a tree's rows at time t. A row's
// state is the last state of every sequence that ends in the row, and the previous state of every
// row at time t + 1 that continues the row. The gradient of the state is the sum over all these
// uses.
template <class Storage, class Scalar>
inline void gather_tree_gradients(const Layer<Storage>& layer,
                                  const StateGradients<Storage>& grad_last, int64_t t,
                                  const Scalar* grad_previous, Scalar* grad) {
  const SequenceLayout& layout = layer.layout;
  const int64_t H = layer.H;
  fill_zeros(grad, layout.count[t] * H);
  if (grad_last.data) {
    for_each_end(layout, t, [&](int64_t b, int64_t sequence) {
      add(grad_last.data + sequence * grad_last.stride, grad + b * H, H);
    });
  }
  if (t + 1 == layout.T) return;
  for (int64_t b = 0; b < layout.count[t + 1]; ++b) {
    add(grad_previous + b * H, grad + parent_of(layout, t + 1, b) * H, H);
  }
}

// Returns whether the caller wants gradients of initial states or of the states after cuts.
template <class Storage>
inline bool wants_starts(const Backward<Storage>& args) {
  return args.grad_initial[0] || args.grad_reset_to[0].data;
}

// Returns whether any step reads panels of weight_hh or weight_hr.
template <class Products, class Storage>
inline bool reads_panels(const Backward<Storage>& args) {
  const Layer<Storage>& layer = args.layer;
  const bool reads_hh = layer.cell->has_weight_hh && (layer.layout.T > 1 || wants_starts(args));
  return reads_hh || projected_size(layer) > 0;
}

// Returns the i-th states of all rows.
template <class Storage>
inline RowStrides<const Storage> all_states(const Backward<Storage>& args, int i) {
  return i == 0 ? args.output : states_in(args.kept, *args.layer.cell, i, args.layer.H);
}

// Computes the gradients of h before its projection for sequences part.slice.begin .. end at time
// t. Also stores the gradients of the projected h in dz, for the gradient of weight_hr.
template <class Products>
inline void project_back(const Backward<typename Products::Storage>& args,
                         const BackwardGroup<Products>& group,
                         const typename Products::Recurrence& panels, int64_t t, int64_t end,
                         int64_t row, const Part& part, const Runtime& runtime) {
  using Scalar = typename Products::Scalar;
  const auto [first, last] = part.outputs;
  const int64_t begin = part.slice.begin;
  for (int64_t b = begin; b < end; ++b) {
    const Scalar* later = group.grad[0] + b * args.layer.P + first;
    const auto* of_output = rows_from(args.grad_output, args.layer.layout, t, b, first).data;
    Scalar* grad_h = group.products.grad_h(row + b) + first;
    for_each_vector<Scalar>(last - first, [=](int64_t j, int64_t n) {
      Vec<Scalar> grad = load_upto(later + j, n);
      if (of_output) grad += load_upto(of_output + j, n);
      store_upto(grad_h + j, grad, n);
    });
  }
  if (part.team) barrier(*part.team, runtime);
  group.products.project_back(row + begin, panels.weight_hr, end - begin, part.columns,
                              group.unprojected + begin * args.layer.H);
}

// At each cut just before time t, stores the gradient of the state from which the sequence restarts
// (if wanted) and zeroes the gradient of the state before the cut. Checks sequences below `end`.
template <class Products>
inline void end_gradients_at_cuts(const Backward<typename Products::Storage>& args,
                                  const BackwardGroup<Products>& group, int64_t t, int64_t end,
                                  const Part& part) {
  const auto& layer = args.layer;
  for_each_cut(layer, t, part.slice.begin, end, [&](int64_t first, int64_t last, bool cut) {
    for (int64_t b = first; cut && b < last; ++b) {
      for (int i = 0; i < layer.cell->states; ++i) {
        const auto [column, last_column] = part.of_state(i);
        auto* grad = group.grad[i] + b * size_of_state(layer, i) + column;
        auto* of_start = restart_state(args.grad_reset_to[i], layer.layout, t, b);
        if (of_start) convert(grad, of_start + column, last_column - column);
        fill_zeros(grad, last_column - column);
      }
    }
  });
}

// Computes the sums' gradients at time t for sequences begin .. end, whose rows are evenly spaced.
template <class Products>
inline void sum_gradients_of(const Backward<typename Products::Storage>& args,
                             const BackwardGroup<Products>& group, int64_t t, int64_t begin,
                             int64_t end, int64_t row, int64_t continued, Columns columns) {
  using Storage = typename Products::Storage;
  const Layer<Storage>& layer = args.layer;
  const Cell& cell = *layer.cell;
  const CellCode<Storage>& code = cell;
  const SequenceLayout& layout = layer.layout;
  const int64_t first = columns.first, offset = begin * layer.H + first;
  const bool projecting = projected_size(layer) > 0;
  GradientRows<Storage> rows{};
  rows.range = {0, end - begin, 0, columns.last - first};
  rows.H = layer.H;
  rows.activation = layer.activation;
  rows.program = cell.program;
  rows.row_registers = group.row_registers;
  if (projecting) {
    rows.unprojected = {group.unprojected + offset, layer.H};
    rows.grad[0] = {group.unprojected + offset, layer.H};
  } else {
    rows.output = rows_from(args.output, layout, t, begin, first);
    rows.grad_output = rows_from(args.grad_output, layout, t, begin, first);
  }
  rows.kept = rows_from(args.kept, layout, t, begin, first);
  for (int i = projecting ? 1 : 0; i < cell.states; ++i) {
    if (i > 0 || !cell.only_through_sums) {
      rows.previous[i] = previous_rows(layer, all_states(args, i), i, t, begin, continued);
      if (rows.previous[i].data) rows.previous[i].data += first;
    }
    rows.grad[i] = {group.grad[i] + offset, layer.H};
    rows.grad_previous[i] = {group.grad_previous[i] + offset, layer.H};
  }
  rows.dz = {group.products.dz_rows(row, first), group.products.dz_stride};
  rows.sum_stride = group.products.dz_block;
  group.own.set(cell, first, rows);
  for (int64_t i = 0; i < cell.own; ++i) {
    rows.grad_own[i] = group.grad_own[1] + own_blocks(cell, i) * layer.H + first;
  }
  for (int i = 0; i < cell.inputs; ++i) {
    const int64_t column = cell.input_is_number[i] ? 0 : first;
    rows.inputs[i] = rows_from(layer.inputs[i], layout, t, begin, column);
    rows.grad_inputs[i] = rows_from(args.grad_inputs[i], layout, t, begin, column);
  }
  code.sum_gradients(rows);
  group.products.store_dz(row, columns);
}

// Adds the last few rows' gradients of the cell's own parameters to the time block's sums.
template <class Products>
inline void add_own_gradients(const Cell& cell, const BackwardGroup<Products>& group, int64_t H,
                              Columns columns) {
  for (int64_t block = 0; block < own_blocks(cell); ++block) {
    const int64_t at = block * H + columns.first;
    add_keeping_errors(group.grad_own[1] + at, columns.last - columns.first,
                       group.grad_own[0] + at);
  }
}

// Computes the backward recurrence at time t. Row (t, b) has index `row + b` in the time block.
template <class Products>
inline void backward_step(const Backward<typename Products::Storage>& args,
                          const BackwardGroup<Products>& group,
                          const typename Products::Recurrence& panels, int64_t t, int64_t row,
                          const Part& part, const Runtime& runtime) {
  const auto& layer = args.layer;
  const Cell& cell = *layer.cell;
  const SequenceLayout& layout = layer.layout;
  const Products& products = group.products;
  const Slice slice = part.slice;
  const int64_t continued = continued_end(layer, t, slice);
  const int64_t end = alive_end(layout, t, slice);
  [[maybe_unused]] const bool projecting = projected_size(layer) > 0;
  for (int i = 0; i < cell.states && layout.tree; ++i) {
    gather_tree_gradients(layer, args.grad_last[i], t, group.grad_previous[i], group.grad[i]);
  }
  if constexpr (Products::can_project) {
    if (projecting) project_back(args, group, panels, t, end, row, part, runtime);
  }
  for_each_even_run(layer, t, slice, continued, [&](int64_t first, int64_t last) {
    while (first < last) {
      // After each chunk of kChain rows, add_own_gradients() adds its gradients to the total.
      const int64_t chunk_end = slice.begin + ((first - slice.begin) / kChain + 1) * kChain;
      const int64_t next = Products::encodes_dz ? first + 1
                           : cell.own           ? min64(last, chunk_end)
                                                : last;
      sum_gradients_of(args, group, t, first, next, row + first, continued, part.columns);
      if (cell.own && (next == chunk_end || next == end)) {
        add_own_gradients(cell, group, layer.H, part.columns);
      }
      first = next;
    }
  });
  if constexpr (Products::can_project) {
    for (int64_t b = slice.begin; b < end && projecting; ++b) {
      products.keep_unprojected(row + b, group.unprojected, b, part.columns);
    }
  }
  if (args.wants_weights || args.grad_input.data) {
    for (int64_t b = slice.begin + part.member; b < end; b += part.members) {
      products.keep_row(row + b, previous_rows(layer, args.output, 0, t, b, continued).data,
                        input_row(layer, t, b), rows_from(args.grad_input, layout, t, b, 0).data);
    }
  }
  const int64_t wanted_end = wants_starts(args) ? end : continued;
  if (cell.has_weight_hh) {
    if (part.team) barrier(*part.team, runtime);
    products.step_back(row + slice.begin, panels.weights, wanted_end - slice.begin, part.outputs,
                       group.grad_previous[0] + slice.begin * layer.P);
  } else if (cell.only_through_sums) {
    for (int64_t b = slice.begin; b < wanted_end; ++b) {
      clear(group.grad_previous[0] + b * layer.P, part.outputs);
    }
  }
  end_gradients_at_cuts(args, group, t, wanted_end, part);
}

template <class Products>
inline void backward_recurrence(const Backward<typename Products::Storage>& args,
                                const BackwardGroup<Products>& group, const TimeBlock& block,
                                Part part, const Runtime& runtime) {
  part.slice = group.rows.slice;
  const auto& layer = args.layer;
  WeightCopies copies = group.copies;
  // The panels are packed in the first time block of the pass, and only if a step reads them.
  copies.packed |= !block.initial || !reads_panels<Products>(args);
  using Panels = typename Products::Recurrence;
  const auto panels = weights_for<Panels>(part, layer, copies);
  for (int64_t i = 0; i < own_blocks(*layer.cell); ++i) {
    for (auto* sums : group.grad_own) clear(sums + i * layer.H, part.columns);
  }
  for (int i = 0; i < layer.cell->states && block.initial && !layer.layout.tree; ++i) {
    read_last_gradients(layer, i, args.grad_last[i], part, group.grad[i]);
  }
  if (group.tokens.token && part.member == 0) {
    link_rows(layer, block, part.slice, group.tokens);
  }
  const int64_t base = first_row(group.rows, block.first);
  for (int64_t s = block.first; s < block.last; ++s) {
    const int64_t t = layer.reverse ? s : block.last - 1 - (s - block.first);
    const int64_t row = first_row(group.rows, t) - base - part.slice.begin;
    backward_step(args, group, panels, t, row, part, runtime);
  }
  group.products.end_recurrence(count_rows(group.rows, block), part);
}

}  // namespace
}  // namespace namernn_fast
