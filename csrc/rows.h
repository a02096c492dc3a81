// Functions that say which rows exist, where the input of a row is, and which row holds its
// previous state. Kernels use a SequenceLayout mostly through these functions. The functions have
// internal linkage because they are compiled once for each instruction set.
#pragma once

#include "arithmetic.h"
#include "contract.h"
#include "expect.h"

namespace namernn_fast {
namespace {

// Sequences begin .. end of a batch.
struct Slice {
  int64_t begin;
  int64_t end;
};

// Returns whether a parameter is a vector, not a matrix.
inline bool is_vector(int parameter) {
  return parameter == kBiasIh || parameter == kBiasHh || parameter >= kOwn;
}

// Returns the number of sequences alive at time t, or zero if t is out of range.
inline int64_t count_at(const SequenceLayout& layout, int64_t t) {
  if (t < 0 || t >= layout.T) return 0;
  return layout.count ? layout.count[t] : layout.B;
}

// Returns the index past the slice's last sequence that is alive at time t, or slice.begin if none
// is alive.
inline int64_t alive_end(const SequenceLayout& layout, int64_t t, Slice slice) {
  return max64(slice.begin, min64(slice.end, count_at(layout, t)));
}

// Returns the number of rows before time t.
inline int64_t rows_before(const SequenceLayout& layout, int64_t t) {
  if (t == layout.T) return layout.N;
  return layout.start ? layout.start[t] : t * layout.B;
}

// Returns the caller's index of sequence b, which is the sequence's row in the initial and last
// states.
inline int64_t place_of(const SequenceLayout& layout, int64_t b) {
  return layout.order ? layout.order[b] : b;
}

// Returns a pointer to row (t, b) of a tensor.
template <class Scalar>
inline Scalar* row_at(const RowStrides<Scalar>& rows, const SequenceLayout& layout, int64_t t,
                      int64_t b) {
  return layout.start ? rows.data + (layout.start[t] + b) * rows.row_stride
                      : rows.data + t * rows.time_stride +
                            (layout.origin ? layout.origin[b] : b) * rows.row_stride;
}

// Returns the time index that step s of the recurrence processes (s counts from 0).
template <class Scalar>
inline int64_t time_of(const Layer<Scalar>& layer, int64_t s) {
  return layer.reverse ? layer.layout.T - 1 - s : s;
}
// Returns the time index before t in recurrence order.
template <class Scalar>
inline int64_t time_before(const Layer<Scalar>& layer, int64_t t) {
  return layer.reverse ? t + 1 : t - 1;
}
// Returns the time index after t in recurrence order.
template <class Scalar>
inline int64_t time_after(const Layer<Scalar>& layer, int64_t t) {
  return layer.reverse ? t - 1 : t + 1;
}

// Returns the index past the slice's last sequence whose previous state is a row of the output at
// time t. Later sequences, up to alive_end(), start from their initial states.
template <class Scalar>
inline int64_t continued_end(const Layer<Scalar>& layer, int64_t t, Slice slice) {
  if (layer.layout.tree) return t > 0 ? alive_end(layer.layout, t, slice) : slice.begin;
  return min64(alive_end(layer.layout, t, slice),
               alive_end(layer.layout, time_before(layer, t), slice));
}

// Returns whether sequence b is cut before the step at time t, so that the step does not read the
// previous state. At the first step of a sequence, the previous state is the initial state. Only a
// reset at time 0 in the forward direction cuts off the initial state.
template <class Scalar>
inline bool is_cut(const Layer<Scalar>& layer, int64_t t, int64_t b) {
  if (!layer.resets.at) return false;
  const int64_t border = layer.reverse ? t + 1 : t;  // a cut is between border - 1 and border
  return border < layer.layout.T && b < count_at(layer.layout, border) &&
         layer.resets.at[border * layer.resets.time_stride + b];
}

// Splits sequences begin .. end into ranges in which either all sequences or none are cut before
// the step at time t, and calls f(begin, end, cut) for each range.
template <class Scalar, class F>
inline void for_each_cut(const Layer<Scalar>& layer, int64_t t, int64_t begin, int64_t end, F&& f) {
  if (!layer.resets.at) return f(begin, end, false);
  for (int64_t b = begin; b < end;) {
    const int64_t first = b;
    const bool cut = is_cut(layer, t, first);
    while (b < end && is_cut(layer, t, b) == cut) ++b;
    f(first, b, cut);
  }
}

// Returns the number of elements per sequence of a layer's i-th state.
template <class Scalar>
inline int64_t size_of_state(const Layer<Scalar>& layer, int i) {
  return i == 0 ? layer.P : layer.H;
}

// Returns the i-th initial state of sequence b; null means zeros.
template <class Scalar>
inline const Scalar* initial_state(const Layer<Scalar>& layer, int i, int64_t b) {
  const EvenRows<const Scalar>& initial = layer.initial[i];
  return initial.data ? initial.data + place_of(layer.layout, b) * initial.stride : nullptr;
}

// Returns the state of sequence b at time t in `states`; null means zeros.
template <class Scalar>
inline Scalar* restart_state(const RestartStates<Scalar>& states, const SequenceLayout& layout,
                             int64_t t, int64_t b) {
  if (!states.data) return nullptr;
  return states.data + t * states.time_stride + place_of(layout, b) * states.stride;
}
// Returns the i-th state that sequence b starts from at time t: its restart state after a cut,
// otherwise its initial state. Null means zeros.
template <class Scalar>
inline const Scalar* starting_state(const Layer<Scalar>& layer, int i, int64_t t, int64_t b) {
  return is_cut(layer, t, b) ? restart_state(layer.reset_to[i], layer.layout, t, b)
                             : initial_state(layer, i, b);
}

// Returns the input of row (t, b), or null if the input is token ids.
template <class Scalar>
inline const Scalar* input_row(const Layer<Scalar>& layer, int64_t t, int64_t b) {
  return layer.input.data ? row_at(layer.input, layer.layout, t, b) : nullptr;
}

// Returns the rows of a tensor that start at row (t, b) and unit `first`; null if the tensor is
// absent.
template <class Scalar>
inline EvenRows<Scalar> rows_from(const RowStrides<Scalar>& rows, const SequenceLayout& layout,
                                  int64_t t, int64_t b, int64_t first) {
  return {rows.data ? row_at(rows, layout, t, b) + first : nullptr, rows.row_stride};
}

// Returns whether the input is token ids.
template <class Scalar>
inline bool has_table(const Layer<Scalar>& layer) {
  return layer.table.ids.data != nullptr;
}

// Returns the token id of row (t, b).
template <class Scalar>
inline int64_t token_of(const Layer<Scalar>& layer, int64_t t, int64_t b) {
  return *row_at(layer.table.ids, layer.layout, t, b);
}
// Returns the table's row for the token of row (t, b). A row of the table has `width` elements.
template <class Scalar>
inline const Scalar* table_row(const Layer<Scalar>& layer, int64_t t, int64_t b, int64_t width) {
  return layer.table.rows + token_of(layer, t, b) * width;
}

// Returns the row at time t - 1 that row (t, b) of a tree continues. Requires t > 0.
inline int64_t parent_of(const SequenceLayout& layout, int64_t t, int64_t b) {
  NAMERNN_EXPECT(layout.tree && t > 0);
  return layout.tree->parent[layout.start[t] + b];
}

// Calls f(b, sequence) for every sequence that ends in a row (t, b) of a tree. `sequence` is the
// caller's index of that sequence.
template <class F>
inline void for_each_end(const SequenceLayout& layout, int64_t t, F&& f) {
  const PrefixTree& tree = *layout.tree;
  for (int64_t b = 0; b < layout.count[t]; ++b) {
    const int64_t row = layout.start[t] + b;
    for (int64_t e = tree.end_start[row]; e < tree.end_start[row + 1]; ++e) {
      f(b, tree.end_sequence[e]);
    }
  }
}

// Returns the number of elements of h that a unit multiplies by weight_hh; 0 without weight_hh.
inline int64_t recurrent_size(const Cell& cell, int64_t H, int64_t P, int64_t heads) {
  NAMERNN_EXPECT(heads > 0);
  return !cell.has_weight_hh ? 0 : heads == 1 ? P : H / heads;
}
template <class Scalar>
inline int64_t recurrent_size(const Layer<Scalar>& layer) {
  return recurrent_size(*layer.cell, layer.H, layer.P, layer.heads);
}

// Returns into how many panels members of a group can split H units. Returns 1 if the pass needs
// whole rows, or if some panel has units of several heads.
inline int64_t panels_to_split(const Cell& cell, bool backward, int64_t H, int64_t heads,
                               int64_t panel_width) {
  const bool needs_rows = backward ? cell.gradients_need_rows : cell.states_need_rows;
  const bool mixes_heads = heads > 1 && H / heads % panel_width != 0;
  return needs_rows || mixes_heads ? 1 : (H + panel_width - 1) / panel_width;
}

// Returns the number of elements in an input row.
template <class Scalar>
inline int64_t input_features(const Layer<Scalar>& layer) {
  return layer.sums_given ? layer.cell->gates * layer.H : layer.D;
}

// Returns how many elements each row has in the i-th input besides x.
inline int64_t features_beside(const Cell& cell, int64_t i, int64_t H) {
  return cell.input_is_number[i] ? 1 : H;
}

// Returns the number of blocks of H elements in the first `count` of the cell's own parameters, or
// in all of them.
inline int64_t own_blocks(const Cell& cell, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += cell.own_blocks[i];
  return blocks;
}
inline int64_t own_blocks(const Cell& cell) { return own_blocks(cell, cell.own); }

// Returns the number of states that a step reads other than through the sums.
inline int64_t carried_states(const Cell& cell) {
  return cell.states - (cell.only_through_sums ? 1 : 0);
}

// Returns whether only float kernels can compute the cell. Kernels for encoded rows need weight_hh,
// carry at most one state, and compute the units of a row in several calls.
inline bool needs_floats(const Cell& cell) {
  return carried_states(cell) > 1 || !cell.has_weight_hh || cell.states_need_rows ||
         cell.gradients_need_rows;
}

// Returns the i-th states of all rows, given the values that the rows keep. Requires i > 0.
template <class Scalar>
inline RowStrides<Scalar> states_in(RowStrides<Scalar> kept, const Cell& cell, int64_t i,
                                    int64_t H) {
  NAMERNN_EXPECT(i > 0 && i < cell.states);
  kept.data += (cell.kept - cell.states + i) * H;
  return kept;
}

// Returns the i-th previous states for a run from for_each_even_run() that starts at row (t, b).
// They are rows of `states`, or the states that the sequences start from at time t; null means
// zeros. `continued` is continued_end() at t for a slice that includes b.
template <class Scalar>
inline EvenRows<const Scalar> previous_rows(const Layer<Scalar>& layer,
                                            const RowStrides<const Scalar>& states, int i,
                                            int64_t t, int64_t b, int64_t continued) {
  const SequenceLayout& layout = layer.layout;
  if (layout.tree) {
    return {t > 0 ? row_at(states, layout, t - 1, parent_of(layout, t, b)) : nullptr, 0};
  }
  if (is_cut(layer, t, b)) {
    const RestartStates<const Scalar>& states_after = layer.reset_to[i];
    return {restart_state(states_after, layout, t, b), states_after.stride};
  }
  if (b >= continued) return {initial_state(layer, i, b), layer.initial[i].stride};
  return {row_at(states, layout, time_before(layer, t), b), states.row_stride};
}

// Splits the slice's rows at time t into runs whose rows and previous states are evenly spaced in
// every tensor. Calls f(begin, end) for each run. `continued` is continued_end().
template <class Scalar, class F>
inline void for_each_even_run(const Layer<Scalar>& layer, int64_t t, Slice slice, int64_t continued,
                              F&& f) {
  const int64_t end = alive_end(layer.layout, t, slice);
  if (layer.layout.order || layer.layout.origin || layer.layout.tree) {
    for (int64_t b = slice.begin; b < end; ++b) f(b, b + 1);
    return;
  }
  const auto run = [&](int64_t first, int64_t last, bool) {
    if (first < last) f(first, last);
  };
  for_each_cut(layer, t, slice.begin, continued, run);
  for_each_cut(layer, t, continued, end, run);
}

// Evenly spaced rows. With `along_time`, these are the rows of sequence b at times t, t + 1, ..;
// otherwise, row (t, b) and the rows that follow it in memory, which may belong to later times.
struct Run {
  int64_t t;
  int64_t b;
  int64_t rows;
  bool along_time;
};

// Returns the stride between consecutive rows of a run in the given tensor.
template <class Scalar>
inline int64_t run_stride(const RowStrides<Scalar>& rows, const Run& run) {
  return run.along_time ? rows.time_stride : rows.row_stride;
}

// Returns whether the rows of each time directly follow the rows of the previous time in the
// tensor.
template <class Scalar>
inline bool is_flat(const RowStrides<Scalar>& rows, const SequenceLayout& layout) {
  return layout.start ||
         (!layout.count && !layout.origin && rows.time_stride == layout.B * rows.row_stride);
}

// Calls f(run) for runs that cover the slice's rows at times first .. last. The runs are as long as
// the layout allows. `flat` means that is_flat() holds for all tensors that f accesses, and
// `along` means that each sequence's rows are evenly spaced in all these tensors.
template <class F>
inline void for_each_run(const SequenceLayout& layout, int64_t first, int64_t last, Slice slice,
                         bool flat, bool along, F&& f) {
  const int64_t width = slice.end - slice.begin;
  if (flat && width == layout.B) {
    f(Run{first, 0, rows_before(layout, last) - rows_before(layout, first), false});
  } else if (along && last - first > width) {
    for (int64_t b = slice.begin; b < slice.end; ++b) {
      int64_t end = last;
      while (end > first && count_at(layout, end - 1) <= b) --end;
      if (end > first) f(Run{first, b, end - first, true});
    }
  } else {
    for (int64_t t = first; t < last; ++t) {
      f(Run{t, slice.begin, alive_end(layout, t, slice) - slice.begin, false});
    }
  }
}

}  // namespace
}  // namespace namernn_fast
