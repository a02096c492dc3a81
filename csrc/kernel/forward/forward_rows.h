// Runs the forward pass on the caller's rows. Each part computes its steps in order. Groups with
// several members wait at a barrier after each step.
#pragma once

#include "kernel/forward/gate_sums.h"
#include "kernel/forward/output_sums.h"

namespace namernn_fast {
namespace {

// Runs the forward pass of one part. Its base class Sums, either OutputSums or GateSums,
// computes projections and states. Panels have elements of type Element.
template <class Sums, class Scalar, class Element>
struct ForwardPart : Sums {
  using Sums::args, Sums::weights, Sums::part, Sums::memory, Sums::projected_steps;
  using Sums::project, Sums::advance;

  // Computes a tree's states at time t. Copies the previous states first, because the rows of a
  // product's left operand must have a constant stride.
  void advance_tree(int64_t t) const {
    NAMERNN_EXPECT(part.members == 1);
    const Layer<Scalar>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const int64_t count = layout.count[t];
    if (t == 0) return advance(t, 0, count, nullptr, 0);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t parent = parent_of(layout, t, b);
      for (int i = 0; i < layer.cell->states; ++i) {
        Scalar* previous = i == 0 ? memory.continued + b * layer.H : this->state_at(i, t, b);
        std::memcpy(previous, this->state_at(i, t - 1, parent), layer.H * sizeof(Scalar));
      }
    }
    advance(t, 0, count, memory.continued, layer.H);
  }

  // Copies the states of sequences that end at time t to args.last. Except in a tree, copies only
  // h, because each step updates the cell states directly in args.last. Does not support layouts
  // with `order`.
  void keep_last_states(int64_t t) const {
    NAMERNN_EXPECT(!args.layer.layout.order);
    const Layer<Scalar>& layer = args.layer;
    const auto [first, last] = part.outputs;
    if (layer.layout.tree) {
      return for_each_end(layer.layout, t, [&](int64_t b, int64_t sequence) {
        for (int i = 0; i < layer.cell->states; ++i) {
          std::memcpy(args.last[i] + sequence * layer.H, this->state_at(i, t, b),
                      layer.H * sizeof(Scalar));
        }
      });
    }
    const int64_t end = alive_end(layer.layout, t, part.slice);
    for (int64_t b = alive_end(layer.layout, time_after(layer, t), part.slice); b < end; ++b) {
      std::memcpy(args.last[0] + b * layer.P + first,
                  row_at(args.output, layer.layout, t, b) + first, (last - first) * sizeof(Scalar));
    }
  }

  // Copies the cell states from which sequences restart at time t to args.last, where each step
  // updates the cell states.
  void restart_cell_states(int64_t t) const {
    const Layer<Scalar>& layer = args.layer;
    const auto [first, last] = part.columns;
    for (int i = 1; i < layer.cell->states && layer.reset_to[i].data; ++i) {
      for (int64_t b = part.slice.begin; b < alive_end(layer.layout, t, part.slice); ++b) {
        if (!is_cut(layer, t, b)) continue;
        read_start(restart_state(layer.reset_to[i], layer.layout, t, b), first, last - first,
                   this->state_at(i, t, b) + first);
      }
    }
  }

  // Writes h = W_hr y to the output for the sequences alive at time t. memory.unprojected holds y,
  // which is h before its projection.
  void project_outputs(int64_t t) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t H = layer.H, b = part.slice.begin;
    const int64_t rows = alive_end(layer.layout, t, part.slice) - b;
    if (rows == 0) return;
    const Operand<Scalar, Element> operand{
        memory.unprojected + b * H, H, weights.weight_hr, H * Sums::w, H, layer.chains.recurrence};
    Scalar* h = row_at(args.output, layer.layout, t, b);
    const Target<Scalar> target{h, args.output.row_stride, nullptr, 0, false};
    product<Scalar>(&operand, 1, target, rows, part.outputs.first, part.outputs.last, NoFinish());
  }

  void run(const Runtime& runtime) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t T = layer.layout.T;
    const bool empty =
        part.slice.begin == part.slice.end || part.columns.first == part.columns.last;
    for (int64_t s = 0; s < T; ++s) {
      const int64_t t = time_of(layer, s);
      if (!empty) {
        if (projected_steps && s % projected_steps == 0) project(s);
        if (layer.layout.tree) {
          advance_tree(t);
        } else {
          restart_cell_states(t);
          const RowStrides<const Scalar> output{args.output.data, args.output.time_stride,
                                                args.output.row_stride};
          const int64_t continued = continued_end(layer, t, part.slice);
          for_each_even_run(layer, t, part.slice, continued, [&](int64_t begin, int64_t end) {
            const auto [h, stride] = previous_rows(layer, output, 0, t, begin, continued);
            advance(t, begin, end, h, stride);
          });
        }
      }
      if (projected_size(layer)) {
        if (part.team) barrier(*part.team, runtime);
        project_outputs(t);
      }
      keep_last_states(t);
      // A barrier waits for all members, so members without rows or columns must call it, too.
      if (part.team && s + 1 < T && layer.cell->has_weight_hh) barrier(*part.team, runtime);
    }
  }
};

// Runs the forward pass of one part with OutputSums or GateSums, whichever the layer needs.
template <class Scalar, class Storage, class Element>
inline void run_part(const ForwardContext<Scalar, Storage, Element>& context,
                     const Runtime& runtime) {
  if (are_sums_in_output(context.args.layer)) {
    using Sums = OutputSums<Scalar, Storage, Element>;
    ForwardPart<Sums, Scalar, Element>{Sums{context}}.run(runtime);
  } else {
    using Sums = GateSums<Scalar, Storage, Element>;
    ForwardPart<Sums, Scalar, Element>{Sums{context}}.run(runtime);
  }
}

// Copies this part's initial cell states to args.last, where each step updates the cell states.
template <class Scalar>
inline void read_cell_states(const Forward<Scalar>& args, const Part& part) {
  const int64_t first = part.columns.first;
  for (int i = 1; i < args.layer.cell->states; ++i) {
    for (int64_t b = part.slice.begin; b < part.slice.end; ++b) {
      const Scalar* initial = initial_state(args.layer, i, b);
      Scalar* last = args.last[i] + place_of(args.layer.layout, b) * args.layer.H + first;
      const bool in_place = initial && initial + first == last;  // a wave may pass one buffer
      if (!in_place) read_start(initial, first, part.columns.last - first, last);
    }
  }
}

// Whether panels are narrow. Then a step reads and writes new rows while it computes a small part
// of its columns, so it would often wait for memory. With wide panels, prefetching rows gains
// nothing.
constexpr bool kNarrowPanels = NAMERNN_REGISTERS < 32;

template <class Scalar>
void forward_rows(const Forward<Scalar>& args, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  const Plan plan = forward_plan(layer, runtime);
  const Scalar* zero_state = zeros<Scalar>(runtime, layer.P);
  Team* teams = scratch<Team>(runtime, plan.groups);
  const WeightCopies weights =
      weight_copies<ForwardPanels<Scalar>>(layer, layer.panels, plan, runtime);
  const ForwardMemory<Scalar> memory = forward_memory(layer, plan, runtime);
  // Per sequence, a step reads two rows of about H elements and writes a third.
  const int64_t row_bytes = 3 * layer.H * int64_t(sizeof(Scalar));
  const int64_t parts = choose_parts(layer.layout, plan, row_bytes, runtime.machine);
  const int64_t projected_steps = choose_projected_steps(plan_arguments(layer, runtime), plan,
                                                         plan.groups * parts, layer.in_place);
  const int64_t new_bytes = (layer.D + layer.P) * int64_t(sizeof(Scalar));
  const bool prefetches = kNarrowPanels && choose_row_prefetch(layer.layout, plan.groups * parts,
                                                               new_bytes, runtime.machine);
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const ForwardWeights<Scalar, Scalar> part_weights =
        forward_weights<Scalar>(part, layer, weights, zero_state, runtime.machine);
    if (!layer.layout.tree) read_cell_states(args, part);
    for (int64_t p = part.group * parts; p < (part.group + 1) * parts; ++p) {
      Part smaller = part;
      smaller.slice = slice_of(layer.layout, p, plan.groups * parts);
      const int64_t steps = fit_projected_steps(projected_steps, memory, smaller.slice);
      run_part<Scalar, Scalar, Scalar>({args, part_weights, smaller, memory, steps, prefetches},
                                       runtime);
    }
  });
}

}  // namespace
}  // namespace namernn_fast
