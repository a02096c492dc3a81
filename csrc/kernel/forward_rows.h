// The forward pass on the caller's rows: every part walks through time step by step, with a barrier
// after each step if its group has several members.
#pragma once

#include "kernel/product_in_place.h"
#include "kernel/weights.h"

namespace namernn_fast {
namespace {

template <class Storage>
inline Workload forward_workload(const Layer<Storage>& layer, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  return {layer.layout,  runtime.machine, layer.D, layer.H, panel_count<Scalar>(layer.H),
          sizeof(Scalar)};
}

template <class Storage>
inline Plan forward_plan(const Layer<Storage>& layer, const Runtime& runtime) {
  return choose_plan(forward_workload(layer, runtime));
}

// The weights that a part reads, and a zero state.
template <class Scalar, class Storage>
struct ForwardWeights {
  const Scalar* weights;  // in the order of ForwardPanels
  const Scalar* bias;
  bool finite;               // whether the part's columns of weight_hh are known to be finite
  const Scalar* zeros;       // [H], the initial state if there is no hx
  const Storage* weight_ih;  // the caller's, if it is read in place; else null
  const Storage* weight_hh;  // likewise
};

// Memory that all parts share, for layers with a table or a tree.
template <class Scalar>
struct ForwardMemory {
  const Scalar* table;       // [V, H], with a table: its rows plus the biases
  const Scalar** looked_up;  // [members, B], with a table: rows that a step's sums start from
  int64_t B;                 // of the whole layer, even if the part works on a time block of it
  Scalar* continued;  // [B, H], with a tree: copies of the states that a step's rows continue
};

// Writes a layer's table plus the biases, in the type that kernels compute in.
template <class Storage>
inline void add_biases(const Layer<Storage>& layer, void* result, const Runtime& runtime) {
  using Scalar = Compute<Storage>;
  Scalar* table = static_cast<Scalar*>(result);
  const int64_t V = layer.table.V;
  const int64_t H = layer.H;
  const int64_t workers = choose_workers(kAddingCost * double(V) * double(H), runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    for (int64_t v = V * begin / workers; v < V * end / workers; ++v) {
      for_each_vector<Scalar>(H, [&](int64_t j, int64_t n) {
        Vec<Scalar> sum = load_upto(layer.table.rows + v * H + j, n);
        if (layer.bias_ih) sum += load_upto(layer.bias_ih + j, n);
        if (layer.bias_hh) sum += load_upto(layer.bias_hh + j, n);
        store_upto(table + v * H + j, sum, n);
      });
    }
  });
}

// Returns a layer's table plus the biases.
template <class Storage, class Scalar = Compute<Storage>>
inline const Scalar* biased_table(const Layer<Storage>& layer, const Runtime& runtime) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    if (!layer.bias_ih && !layer.bias_hh) return layer.table.rows;
  }
  Scalar* table = scratch<Scalar>(runtime, layer.table.V * layer.H);
  add_biases(layer, table, runtime);
  return table;
}

template <class Storage, class Scalar = Compute<Storage>>
inline ForwardMemory<Scalar> forward_memory(const Layer<Storage>& layer, const Plan& plan,
                                            const Runtime& runtime) {
  ForwardMemory<Scalar> memory{};
  if (layer.layout.tree) memory.continued = scratch<Scalar>(runtime, layer.layout.B * layer.H);
  if (!has_table(layer)) return memory;
  memory.B = layer.layout.B;
  memory.looked_up = static_cast<const Scalar**>(
      runtime.scratch(size_t(plan.members * layer.layout.B) * sizeof(const Scalar*)));
  memory.table = biased_table(layer, runtime);
  return memory;
}

template <class Cell, class Storage, class Scalar>
inline ForwardWeights<Scalar, Storage> forward_weights(const Part& part,
                                                       const Layer<Storage>& layer,
                                                       const WeightCopies& copies,
                                                       const Scalar* zeros) {
  const auto panels = weights_for<ForwardPanels<Cell, Storage>>(part, layer, copies);
  bool finite = true;
  for (int64_t j = part.columns.first; j < part.columns.last; j += panels.w) {
    finite &= panels.finite[j / panels.w];
  }
  return {panels.weights,
          panels.bias,
          finite,
          zeros,
          layer.in_place.weight_ih ? layer.weight_ih : nullptr,
          layer.in_place.weight_hh ? layer.weight_hh : nullptr};
}

// The forward pass of one part: a slice of the sequences and columns of the hidden units. Weights
// that are read in place are stored as Storage.
template <class Cell, class Scalar, class Storage = Scalar>
struct ForwardPart {
  static_assert(Cell::sums == 1 && Cell::sums_in_output,
                "project() and advance() compute one block of sums, in the rows of the output");

  static constexpr int64_t w = Shape<Scalar>::panel_width;

  const Forward<Scalar>& args;
  const ForwardWeights<Scalar, Storage>& weights;
  const Part& part;
  const ForwardMemory<Scalar>& memory;
  int64_t projected_steps;  // projected at once, ahead of the recurrence; or 0

  int64_t panel_size() const {
    return ForwardPanels<Cell, Storage>::unit_block_size(args.layer.D, args.layer.H);
  }

  Operand<Scalar> projection(const Scalar* x, int64_t stride) const {
    return {
        x, stride, 1, weights.weights, panel_size(), args.layer.D, args.layer.chains.projection};
  }
  Operand<Scalar> recurrence(const Scalar* h, int64_t stride) const {
    const Scalar* weight_hh = weights.weights + args.layer.D * w;
    return {h, stride, 1, weight_hh, panel_size(), args.layer.H, args.layer.chains.recurrence};
  }

  // Returns pointers to the table's rows for sequences begin .. end at time t.
  const Scalar* const* look_up(int64_t t, int64_t begin, int64_t end) const {
    const Scalar** rows = memory.looked_up + part.member * memory.B + begin;
    for (int64_t b = begin; b < end; ++b) {
      rows[b - begin] = memory.table + token_of(args.layer, t, b) * args.layer.H;
    }
    return rows;
  }

  // Writes the projection of the inputs plus the biases to the output rows of the projected_steps
  // steps from s on.
  void project(int64_t s) const {
    const Layer<Scalar>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const bool flat = is_flat(layer.input, layout) && is_flat(args.output, layout);
    const bool along = !layout.start;
    const int64_t t = time_of(layer, s);
    const int64_t ahead = time_of(layer, min64(s + projected_steps, layout.T) - 1);
    for_each_run(
        layout, min64(t, ahead), max64(t, ahead) + 1, part.slice, flat, along, [&](const Run& run) {
          const Scalar* x = input_row(layer, run.t, run.b);
          const int64_t stride = run_stride(layer.input, run);
          const Target<Scalar> target{row_at(args.output, layout, run.t, run.b),
                                      run_stride(args.output, run), weights.bias, 0, false};
          const auto [first, last] = part.columns;
          if (weights.weight_ih) {
            const OperandInPlace<Scalar, Storage> operand{x, stride, weights.weight_ih, layer.D};
            product_in_place(operand, target, run.rows, first, last, NoFinish());
          } else {
            const Operand<Scalar> operand = projection(x, stride);
            product<Scalar, false>(&operand, 1, target, run.rows, first, last, NoFinish());
          }
        });
  }

  // Computes the states of sequences begin .. end at time t from their previous states `h`; null
  // means zeros.
  void advance(int64_t t, int64_t begin, int64_t end, const Scalar* h, int64_t h_stride) const {
    const Layer<Scalar>& layer = args.layer;
    Scalar* out = row_at(args.output, layer.layout, t, begin);
    const int64_t out_stride = args.output.row_stride;
    Target<Scalar> target{out, out_stride, projected_steps ? out : weights.bias,
                          projected_steps ? out_stride : 0, false};
    if (has_table(layer)) target.starts = look_up(t, begin, end);
    const Cell cell(layer);
    const auto finish = [&](int64_t i, int64_t j, int64_t rows, int64_t width) {
      for (int64_t r = i; r < i + rows; ++r) cell.states(out + r * out_stride + j, width);
    };
    const auto [first, last] = part.columns;
    if (!h && !weights.finite) h = weights.zeros, h_stride = 0;  // zero times infinity is NaN
    if (weights.weight_hh) {
      const OperandInPlace<Scalar, Storage> operand{h, h_stride, weights.weight_hh, layer.H};
      return product_in_place(operand, target, end - begin, first, last, finish);
    }
    Operand<Scalar> operands[2];
    int count = 0;
    if (!projected_steps && !has_table(layer)) {
      operands[count++] = projection(input_row(layer, t, begin), layer.input.row_stride);
    }
    if (h) operands[count++] = recurrence(h, h_stride);
    product<Scalar, false>(operands, count, target, end - begin, first, last, finish);
  }

  // Computes the states at time t of a tree. The previous states are copied first, because the rows
  // of a product's left operand must have a constant stride.
  void advance_tree(int64_t t) const {
    NAMERNN_EXPECT(part.members == 1);
    const Layer<Scalar>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const int64_t count = layout.count[t];
    if (t == 0) return advance(t, 0, count, nullptr, 0);
    for (int64_t b = 0; b < count; ++b) {
      std::memcpy(memory.continued + b * layer.H,
                  row_at(args.output, layout, t - 1, parent_of(layout, t, b)),
                  layer.H * sizeof(Scalar));
    }
    advance(t, 0, count, memory.continued, layer.H);
  }

  // Copies the states of sequences whose last step is at time t to h_n. Not for layouts with
  // `order`.
  void keep_last_states(int64_t t) const {
    NAMERNN_EXPECT(!args.layer.layout.order);
    const Layer<Scalar>& layer = args.layer;
    const auto [first, last] = part.columns;
    if (layer.layout.tree) {
      return for_each_end(layer.layout, t, [&](int64_t b, int64_t sequence) {
        std::memcpy(args.h_n + sequence * layer.H, row_at(args.output, layer.layout, t, b),
                    layer.H * sizeof(Scalar));
      });
    }
    const int64_t end = alive_end(layer.layout, t, part.slice);
    for (int64_t b = alive_end(layer.layout, time_after(layer, t), part.slice); b < end; ++b) {
      std::memcpy(args.h_n + b * layer.H + first, row_at(args.output, layer.layout, t, b) + first,
                  (last - first) * sizeof(Scalar));
    }
  }

  void run(const Runtime& runtime) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t T = layer.layout.T;
    const bool empty =
        part.slice.begin == part.slice.end || part.columns.first == part.columns.last;
    for (int64_t s = 0; s < T; ++s) {
      if (!empty) {
        const int64_t t = time_of(layer, s);
        if (projected_steps && s % projected_steps == 0) project(s);
        if (layer.layout.tree) {
          advance_tree(t);
        } else {
          for_each_previous(layer, args.output, t, part.slice,
                            [&](int64_t begin, int64_t end, const Scalar* h, int64_t h_stride) {
                              advance(t, begin, end, h, h_stride);
                            });
        }
        keep_last_states(t);
      }
      // Members without rows or columns must also meet the others at the barrier.
      if (part.team && s + 1 < T) barrier(*part.team, runtime);
    }
  }
};

template <class Cell, class Scalar>
void forward_rows(const Forward<Scalar>& args, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  const Plan plan = forward_plan(layer, runtime);
  const Scalar* zero_state = zeros<Scalar>(runtime, layer.H);
  Team* teams = scratch<Team>(runtime, plan.groups);
  const WeightCopies weights = weight_copies<ForwardPanels<Cell, Scalar>>(layer, plan, runtime);
  const ForwardMemory<Scalar> memory = forward_memory(layer, plan, runtime);
  // For every sequence, a step reads two rows of H elements and writes one.
  const int64_t row_bytes = 3 * layer.H * int64_t(sizeof(Scalar));
  const int64_t parts =
      plan.members > 1 ? 1 : count_parts(layer.layout, plan.groups, row_bytes, runtime);
  const int64_t projected_steps = choose_projected_steps(forward_workload(layer, runtime), plan,
                                                         plan.groups * parts, layer.in_place);
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const ForwardWeights<Scalar, Scalar> own =
        forward_weights<Cell>(part, layer, weights, zero_state);
    for (int64_t p = part.group * parts; p < (part.group + 1) * parts; ++p) {
      Part smaller = part;
      smaller.slice = slice_of(layer.layout, p, plan.groups * parts);
      ForwardPart<Cell, Scalar>{args, own, smaller, memory, projected_steps}.run(runtime);
    }
  });
}

}  // namespace
}  // namespace namernn_fast
