// Runs the forward pass on copies of rows, one time block at a time. Handles 16-bit rows, and rows
// in an order that products cannot read in place. If a call wants no output, discards the output
// rows after each time block.
#pragma once

#include "kernel/forward/forward_rows.h"

namespace namernn_fast {
namespace {

// Approximate size in bytes of the copied inputs and outputs of a time block. Sanitizer builds use
// a smaller size, so that even small tests run several time blocks.
#if defined(NAMERNN_FAST_SANITIZE)
constexpr int64_t kCopiedBytes = int64_t(1) << 14;
#else
constexpr int64_t kCopiedBytes = int64_t(1) << 20;
#endif

// Copies of the rows of one time block, shared by all parts. Every member of a group has its own
// copy of the inputs, because converting an input again takes less time than reading a copy that
// another core has just written.
template <class Scalar>
struct CopiedRows {
  int64_t steps;   // number of steps in a time block
  Scalar* input;   // [members, steps, B, input features]
  int64_t* ids;    // [members, steps, B], token ids; null without a table
  Scalar* output;  // [steps, B, P]
  Scalar* kept;    // [steps, B, kept blocks * H]; null if nothing is kept
  // h at the start of the time block [B, P], and the cell states at the current step [B, H].
  Scalar* states[kMostStates];
  // States to restart from at cuts: h [steps, B, P] and the cell states [steps, B, H], or null.
  Scalar* reset_to[kMostStates];
  Scalar* last;                 // [B, P], h at the end of the time block
  Scalar* inputs[kMostInputs];  // [steps, B, H or 1]; null if absent
};

// Runs one part's forward pass on copies of its rows.
template <class Storage, class Element>
struct CopiedPart {
  using Scalar = Compute<Storage>;
  static constexpr bool kIsNarrow = !std::is_same_v<Storage, Scalar>;

  const Forward<Storage>& args;
  const ForwardWeights<Scalar, Storage, Element>& weights;
  const CopiedRows<Scalar>& copies;
  const ForwardMemory<Scalar>& memory;
  const Part& part;
  const Plan& plan;

  // Returns the number of elements of state i that the part computes.
  int64_t width(int i) const { return part.of_state(i).last - part.of_state(i).first; }
  // Returns the offset of the part's columns in the i-th state of sequence b.
  int64_t state_at(int i, int64_t b) const {
    return b * size_of_state(args.layer, i) + part.of_state(i).first;
  }
  // Returns a pointer to row (t, b) of the copied `rows`, which have `features` elements each.
  // `first` is the first time of the time block.
  Scalar* copy_at(Scalar* rows, int64_t first, int64_t t, int64_t b, int64_t features) const {
    return rows + ((t - first) * args.layer.layout.B + b) * features;
  }

  void read_initial_states() const {
    const Layer<Storage>& layer = args.layer;
    for (int64_t b = part.slice.begin; b < part.slice.end; ++b) {
      for (int i = 0; i < layer.cell->states; ++i) {
        const int64_t first = part.of_state(i).first;
        Scalar* to = copies.states[i] + state_at(i, b);
        if constexpr (kIsNarrow) {
          const float* floats = args.float_states.initial[i];
          if (floats) {
            read_start(floats + b * size_of_state(args.layer, i), first, width(i), to);
            continue;
          }
        }
        read_start(initial_state(args.layer, i, b), first, width(i), to);
      }
    }
  }

  // Returns the arguments for the forward pass over the copied rows at times first .. last.
  // `initial` says whether the recurrence starts in this time block.
  Forward<Scalar> arguments_of(int64_t first, int64_t last, bool initial) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    Forward<Scalar> copied{};
    copied.layer.cell = layer.cell;
    copied.layer.layout.T = last - first;
    copied.layer.layout.B = count_at(layout, first);
    copied.layer.layout.N = (last - first) * copied.layer.layout.B;
    if (layout.count) copied.layer.layout.count = layout.count + first;
    copied.layer.D = layer.D;
    copied.layer.H = layer.H;
    copied.layer.P = layer.P;
    copied.layer.heads = layer.heads;
    copied.layer.sums_given = layer.sums_given;
    copied.layer.reverse = layer.reverse;
    copied.layer.activation = layer.activation;
    copied.layer.chains = layer.chains;
    if (has_table(layer)) {
      copied.layer.table.ids = {ids(), layout.B, 1};
    } else {
      const int64_t features = input_features(layer);
      copied.layer.input = {input(), layout.B * features, features};
    }
    const bool from_zeros =
        initial && !layer.initial[0].data && !args.float_states.initial[0] && weights.finite;
    copied.layer.initial[0] = {from_zeros ? nullptr : copies.states[0], layer.P};
    if (layer.resets.at) {
      copied.layer.resets = {layer.resets.at + first * layer.resets.time_stride,
                             layer.resets.time_stride};
      for (int i = 0; i < layer.cell->states && copies.reset_to[i]; ++i) {
        const int64_t size = size_of_state(layer, i);
        copied.layer.reset_to[i] = {copies.reset_to[i], layout.B * size, size};
      }
    }
    for (int i = 0; i < layer.cell->inputs; ++i) {
      const int64_t features = features_beside(*layer.cell, i, layer.H);
      if (copies.inputs[i])
        copied.layer.inputs[i] = {copies.inputs[i], layout.B * features, features};
    }
    copied.output = {copies.output, layout.B * layer.P, layer.P};
    const int64_t kept = layer.cell->kept * layer.H;
    if (copies.kept) copied.kept = {copies.kept, layout.B * kept, kept};
    copied.last[0] = copies.last;
    for (int i = 1; i < layer.cell->states; ++i) copied.last[i] = copies.states[i];
    return copied;
  }

  // Return the member's own copy of the inputs and of the token ids.
  Scalar* input() const {
    return copies.input +
           part.member * copies.steps * args.layer.layout.B * input_features(args.layer);
  }
  int64_t* ids() const { return copies.ids + part.member * copies.steps * args.layer.layout.B; }

  // Copies what the slice reads at times first .. last: x or token ids, additional inputs, and the
  // states from which sequences restart. Zeroes the states of sequences that are cut just before
  // t_begin, the time at which the recurrence enters the time block. ForwardPart handles cuts
  // within the time block.
  void read_time_block(int64_t first, int64_t last, int64_t t_begin) const {
    const Layer<Storage>& layer = args.layer;
    const Slice slice = part.slice;
    for (int64_t t = first; t < last; ++t) {
      const int64_t end = alive_end(layer.layout, t, slice);
      for (int64_t b = slice.begin; b < end; ++b) {
        if (has_table(layer)) {
          ids()[(t - first) * layer.layout.B + b] = token_of(layer, t, b);
        } else {
          const int64_t features = input_features(layer);
          convert(input_row(layer, t, b), copy_at(input(), first, t, b, features), features);
        }
        for (int i = 0; i < layer.cell->inputs; ++i) {
          if (!copies.inputs[i]) continue;
          const int64_t features = features_beside(*layer.cell, i, layer.H);
          // The first member copies a number that belongs to all units.
          const bool is_number = layer.cell->input_is_number[i];
          const Columns columns = is_number ? Columns{0, part.member == 0} : part.columns;
          convert(rows_from(layer.inputs[i], layer.layout, t, b, columns.first).data,
                  copy_at(copies.inputs[i], first, t, b, features) + columns.first,
                  columns.last - columns.first);
        }
        for (int i = 0; i < layer.cell->states && copies.reset_to[i] && is_cut(layer, t, b); ++i) {
          const int64_t column = part.of_state(i).first;
          read_start(restart_state(layer.reset_to[i], layer.layout, t, b), column, width(i),
                     copy_at(copies.reset_to[i], first, t, b, size_of_state(layer, i)) + column);
        }
      }
    }
    for (int64_t b = slice.begin; b < continued_end(layer, t_begin, slice); ++b) {
      for (int i = 0; i < layer.cell->states && is_cut(layer, t_begin, b); ++i) {
        fill_zeros(copies.states[i] + state_at(i, b), width(i));
      }
    }
  }

  // Writes the part's columns of the copied rows to the caller's rows. A row has `blocks` blocks,
  // each as wide as the i-th state.
  void write_time_block(Scalar* copied, int64_t first, int64_t last,
                        const RowStrides<Storage>& rows, int64_t blocks, int i) const {
    const Layer<Storage>& layer = args.layer;
    const int64_t size = size_of_state(layer, i);
    for (int64_t t = first; t < last; ++t) {
      for (int64_t b = part.slice.begin; b < alive_end(layer.layout, t, part.slice); ++b) {
        for (int64_t g = 0; g < blocks; ++g) {
          const int64_t column = g * size + part.of_state(i).first;
          convert(copy_at(copied, first, t, b, blocks * size) + column,
                  row_at(rows, layer.layout, t, b) + column, width(i));
        }
      }
    }
  }

  void run(const Runtime& runtime) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    read_initial_states();
    for (int64_t s = 0; s < layout.T; s += copies.steps) {
      const int64_t s_end = min64(s + copies.steps, layout.T);
      const int64_t first = min64(time_of(layer, s), time_of(layer, s_end - 1));
      const int64_t last = first + (s_end - s);
      const int64_t alive = count_at(layout, first);
      read_time_block(first, last, time_of(layer, s));
      if (part.team) barrier(*part.team, runtime);
      Part alive_part = part;
      alive_part.slice = {min64(part.slice.begin, alive), min64(part.slice.end, alive)};
      const Forward<Scalar> copied = arguments_of(first, last, s == 0);
      const int64_t projected_steps = choose_projected_steps(plan_arguments(copied.layer, runtime),
                                                             plan, plan.groups, layer.in_place);
      const int64_t steps = fit_projected_steps(projected_steps, memory, alive_part.slice);
      run_part<Scalar, Storage, Element>({copied, weights, alive_part, memory, steps, false},
                                         runtime);
      if (args.output.data) write_time_block(copies.output, first, last, args.output, 1, 0);
      if (copies.kept) write_time_block(copies.kept, first, last, args.kept, layer.cell->kept, 1);
      if (part.team) barrier(*part.team, runtime);
      for (int64_t b = alive_part.slice.begin; b < alive_part.slice.end; ++b) {
        std::memcpy(copies.states[0] + state_at(0, b), copies.last + state_at(0, b),
                    width(0) * sizeof(Scalar));
      }
    }
    for (int64_t b = part.slice.begin; b < part.slice.end; ++b) {
      for (int i = 0; i < layer.cell->states; ++i) {
        const int64_t last_at = state_at(i, place_of(layout, b));
        const Scalar* state = copies.states[i] + state_at(i, b);
        if constexpr (kIsNarrow) {
          if (args.float_states.last[i]) {
            convert(state, args.float_states.last[i] + last_at, width(i));
            continue;
          }
        }
        convert(state, args.last[i] + last_at, width(i));
      }
    }
  }
};

// Returns whether to store panels in 16 bits, so that every product converts the weights. With few
// rows, this is faster than reading float panels that do not fit in the private cache, and faster
// than converting all of the layer's 16-bit panels first.
template <class Storage>
inline bool choose_narrow(const Layer<Storage>& layer, const Plan& plan, const Machine& machine) {
  constexpr int64_t few_rows = 4;   // up to this many rows, conversion is free (bandwidth-bound)
  constexpr int64_t few_tiles = 4;  // at this many tiles, converting all panels first is as fast
  const int64_t tiles = (layer.layout.B + kTileRows - 1) / kTileRows;
  if (layer.panels && layer.layout.T * tiles <= few_tiles) return true;
  if (layer.in_place.weight_hh || layer.layout.B > few_rows) return false;
  const int64_t bytes =
      layer.cell->gates * layer.H * recurrent_size(layer) * int64_t(sizeof(float));
  return bytes / plan.members >= int64_t(machine.l2_bytes) * kLoadingCost<Storage>;
}

// Runs the forward pass with panels that store the weights as elements of type Element.
template <class Element, class Storage>
void forward_copied_with(const Forward<Storage>& args, const Plan& plan, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  const Layer<Storage>& layer = args.layer;
  const SequenceLayout& layout = layer.layout;
  const Scalar* zero_state = zeros<Scalar>(runtime, layer.P);
  Team* teams = scratch<Team>(runtime, plan.groups);
  const WeightCopies weights = weight_copies<ForwardPanels<Storage, Element>>(
      layer, std::is_same_v<Element, Storage> ? layer.panels : nullptr, plan, runtime);
  const ForwardMemory<Scalar> memory = forward_memory(layer, plan, runtime);
  CopiedRows<Scalar> rows{};
  const int64_t features = input_features(layer);
  const int64_t row = (plan.members * features + layer.H) * int64_t(sizeof(Scalar));
  rows.steps = max64(1, min64(kCopiedBytes / (layout.B * row), layout.T));
  rows.input = scratch<Scalar>(runtime, plan.members * rows.steps * layout.B * features);
  if (has_table(layer)) rows.ids = scratch<int64_t>(runtime, plan.members * rows.steps * layout.B);
  rows.output = scratch<Scalar>(runtime, rows.steps * layout.B * layer.P);
  if (args.kept.data) {
    rows.kept = scratch<Scalar>(runtime, rows.steps * layout.B * layer.cell->kept * layer.H);
  }
  for (int i = 0; i < layer.cell->states; ++i) {
    const int64_t size = layout.B * size_of_state(layer, i);
    rows.states[i] = scratch<Scalar>(runtime, size);
    if (layer.reset_to[i].data) {
      rows.reset_to[i] = scratch<Scalar>(runtime, rows.steps * size);
    }
  }
  rows.last = scratch<Scalar>(runtime, layout.B * layer.P);
  for (int i = 0; i < layer.cell->inputs; ++i) {
    if (!layer.inputs[i].data) continue;
    rows.inputs[i] =
        scratch<Scalar>(runtime, rows.steps * layout.B * features_beside(*layer.cell, i, layer.H));
  }
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const ForwardWeights<Scalar, Storage, Element> part_weights =
        forward_weights<Element>(part, layer, weights, zero_state, runtime.machine);
    CopiedPart<Storage, Element>{args, part_weights, rows, memory, part, plan}.run(runtime);
  });
}

template <class Storage>
void forward_copied(const Forward<Storage>& args, const Runtime& runtime) {
  const Plan plan = forward_plan(args.layer, runtime);
  if constexpr (!std::is_same_v<Storage, Compute<Storage>>) {
    if (choose_narrow(args.layer, plan, runtime.machine)) {
      return forward_copied_with<Storage>(args, plan, runtime);
    }
  }
  forward_copied_with<Compute<Storage>>(args, plan, runtime);
}

}  // namespace
}  // namespace namernn_fast
