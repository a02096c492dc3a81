// Runs the forward pass with instructions that multiply pairs of bfloat16 and sum in float.
//
// The products read inputs, states and weights as terms (terms.h): bfloat16 tensors as they are,
// float tensors rounded to one or two terms. Rows of terms are padded with zeros to a multiple of
// kGranule elements. Two arrays of states alternate: each step reads one array and writes its
// states to the other. A state that the next step reads without a product stays in float: the cell
// state, or h if the cell is not only_through_sums.
#pragma once

#include "kernel/cells/cell.h"
#include "kernel/pair_panels.h"

namespace namernn_fast {
namespace {

// Memory for the rows of one group.
template <int kTerms>
struct PairRows {
  Terms<kTerms> states[2];  // [B, padded(H)] each: step s reads states[s % 2]
  Terms<kTerms> inputs[2];  // [steps * B, padded(D)] each: stretch n of `steps` steps reads
                            // inputs[n % 2]
  int64_t steps;            // number of steps whose inputs are read at once
  float* projected;  // [unit blocks, weight blocks, capacity, panel_width], the projection of
                     // these steps; null if each step projects its own inputs
  int64_t capacity;  // number of rows in `inputs` and `projected`
};

// Runs the forward pass of one part.
template <class Cell, class Storage, int kTerms>
struct PairPart {
  static constexpr int64_t w = Shape<float>::panel_width;
  static constexpr int64_t kBlock = PairTile::rows * w;  // elements in the tile of one sum

  const Forward<Storage>& args;
  const PairPanels<Cell, Storage, kTerms>& panels;
  const Part& part;
  const PairRows<kTerms>& rows;
  float* carried;  // [B, state_size(H)], the state that a step reads without a product; null if
                   // there is none
  bool one_row;    // whether the batch is a single sequence, whose products use multiply_row()
  bool packs;      // whether the part packs each unit block just before its products

  // A step reads at most one state without a product.
  static_assert(Cell::states == 1 || Cell::only_through_sums);
  // The index of the state that a step reads without a product, which is always the cell's last
  // state; -1 if there is no such state.
  static constexpr int carried_state =
      Cell::states == 1 && Cell::only_through_sums ? -1 : Cell::states - 1;
  // Returns the number of elements in a row of `carried`, which consists of whole vectors.
  static int64_t state_size(int64_t H) { return panel_count<float>(H) * w; }

  // Returns the index of row (s, b) in `inputs` and `projected`.
  int64_t row_of(int64_t s, int64_t b) const {
    return s % rows.steps * (part.slice.end - part.slice.begin) + b - part.slice.begin;
  }
  const Terms<kTerms>& inputs_at(int64_t s) const { return rows.inputs[s / rows.steps % 2]; }
  Terms<kTerms> input_terms(int64_t s, int64_t b) const {
    return inputs_at(s) + row_of(s, b) * padded(args.layer.D);
  }
  float* projected_at(int64_t j, int64_t s, int64_t row) const {
    return rows.projected + ((j / w * Cell::weight_blocks + s) * rows.capacity + row) * w;
  }

  // Copies the member's share of the inputs of a stretch that starts at step `first`.
  void read_inputs(int64_t first) const {
    const Layer<Storage>& layer = args.layer;
    if (layer.D == 0) return;
    for (int64_t s = first; s < min64(first + rows.steps, layer.layout.T); ++s) {
      const int64_t t = time_of(layer, s);
      const int64_t end = alive_end(layer.layout, t, part.slice);
      for (int64_t b = part.slice.begin + part.member; b < end; b += part.members) {
        convert(input_row(layer, t, b), input_terms(s, b), layer.D);
      }
    }
  }

  // Copies the member's share of the states of sequences that start at step s. The previous step
  // writes the states of all other sequences.
  void read_states(int64_t s) const {
    const Layer<Storage>& layer = args.layer;
    const int64_t t = time_of(layer, s);
    const int64_t end = alive_end(layer.layout, t, part.slice);
    const int64_t first = continued_end(layer, t, part.slice);
    for (int64_t b = part.slice.begin + part.member; b < end; b += part.members) {
      if (b < first) continue;
      const Terms<kTerms> state = rows.states[s % 2] + (b - part.slice.begin) * padded(layer.H);
      if (args.float_states.initial[0]) {
        convert(args.float_states.initial[0] + b * layer.H, state, layer.H);
      } else if (layer.initial[0].data && !is_cut(layer, t, b)) {
        convert(initial_state(layer, 0, b), state, layer.H);
      } else {
        fill_zeros(state, layer.H);
      }
    }
  }

  // Projects the inputs of the stretch that starts at step `first`.
  void project(PairTile& tile, int64_t first) const {
    const Layer<Storage>& layer = args.layer;
    const int64_t last = min64(first + rows.steps, layer.layout.T);
    const int64_t D = padded(layer.D);
    const int64_t count = row_of(last - 1, part.slice.end - 1) + 1;
    for (int64_t j = part.columns.first; j < part.columns.last; j += w) {
      const auto project_sum = [&](int64_t s, bool has_input, bool, const Terms<kTerms>& panel) {
        for (int64_t i = 0; has_input && i < count; i += PairTile::rows) {
          const PairOperands<kTerms> operands{inputs_at(first) + i * D, D, D, panel};
          tile.multiply(&operands, 1, min64(PairTile::rows, count - i), nullptr,
                        projected_at(j, s, i));
        }
      };
      panels.for_each_panel(layer.D, layer.H, j / w, project_sum);
    }
  }

  // Computes the sums of `height` rows, starting at row (s, b), for the unit block that starts at
  // unit j.
  void multiply(PairTile& tile, int64_t step, int64_t b, int64_t height, int64_t j,
                float* sums) const {
    const int64_t D = padded(args.layer.D);
    const int64_t H = padded(args.layer.H);
    const int64_t row = b - part.slice.begin;
    const auto sum = [&](int64_t s, bool has_input, bool has_state, const Terms<kTerms>& panel) {
      PairOperands<kTerms> operands[2];
      int count = 0;
      const float* start = nullptr;
      if (has_input && rows.projected) {
        start = projected_at(j, s, row_of(step, b));
      } else if (has_input) {
        operands[count++] = {input_terms(step, b), D, D, panel};
      }
      if (has_state) {
        operands[count++] = {rows.states[step % 2] + row * H, H, H, panel + has_input * D * w};
      }
      float* c = sums + s * kBlock;
      one_row ? tile.multiply_row(operands, count, start, c)
              : tile.multiply(operands, count, height, start, c);
    };
    panels.for_each_panel(args.layer.D, args.layer.H, j / w, sum);
  }

  // Adds the biases and, if the layer has a table, the table's row for (t, b) to the sums of units
  // j .. j + width.
  void add_starts(int64_t t, int64_t b, int64_t j, int64_t width, float* sums) const {
    const Layer<Storage>& layer = args.layer;
    const bool biased = layer.table.biased != nullptr;
    const Storage* looked_up =
        has_table(layer) ? table_row(layer, t, b, Cell::weight_blocks * layer.H) + j : nullptr;
    const float* bias = panels.bias_of(j / w);
    for (int64_t s = 0; s < Cell::sums; ++s, bias += w, sums += kBlock) {
      const Storage* row = looked_up && s < Cell::weight_blocks
                               ? looked_up + Cell::input_block(s) * layer.H
                               : nullptr;
      for_each_vector<float>(width, [&](int64_t c, int64_t n) {
        Vec<float> sum = load(sums + c);
        if (!row || !biased) sum += load(bias + c);
        if (row) sum += load_upto(row + c, n);
        store(sums + c, sum);
      });
    }
  }

  struct Step {
    int64_t t;
    int64_t continued_end;  // sequences below this index continue from the previous step
    int64_t continues_end;  // sequences below this index continue at the next step
    Terms<kTerms> next;     // the states that the next step reads
  };

  // Turns the sums of units j .. j + width of sequence b into states, and writes h to the output.
  // If the sequence continues, also writes h to the states that the next step reads; otherwise
  // writes all states to `last`.
  void finish(const Step& step, int64_t b, int64_t j, int64_t width, float* sums) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const int64_t H = layer.H;
    const int64_t t = step.t;
    const bool continues = b < step.continues_end;
    add_starts(t, b, j, width, sums);
    StateRow<float, Storage> row{sums, kBlock, {}, {sums}, nullptr, H, width};
    if (args.kept.data) row.kept = row_at(args.kept, layout, t, b) + j;
    if constexpr (carried_state >= 0) {
      float* state = carried + b * state_size(H) + j;
      const bool cut = is_cut(layer, t, b);
      const bool starts = b >= step.continued_end || cut;
      const Storage* initial = starts && !cut ? initial_state(layer, carried_state, b) : nullptr;
      const float* floats = starts ? args.float_states.initial[carried_state] : nullptr;
      if (initial) convert(initial + j, state, width);
      if (floats) convert(floats + b * H + j, state, width);
      row.previous[carried_state] = starts && !initial && !floats ? nullptr : state;
      row.states[carried_state] = state;
    }
    Cell(layer).states_of(row);
    for (int i = 1; i < Cell::states && !continues; ++i) {
      const int64_t at = place_of(layout, b) * H + j;
      float* floats = args.float_states.last[i];
      floats ? convert(row.states[i], floats + at, width)
             : convert(row.states[i], args.last[i] + at, width);
    }
    const float* h = row.states[0];
    // Always loads whole vectors, which is faster if the vectors have just been written.
    const auto write = [h, width](const auto& to) {
      for_each_vector<float>(width,
                             [=](int64_t c, int64_t n) { store_upto(to + c, load(h + c), n); });
    };
    if (args.output.data) write(row_at(args.output, layout, t, b) + j);
    const Terms<kTerms> next = step.next + ((b - part.slice.begin) * padded(H) + j);
    if (!continues) {
      const int64_t at = place_of(layout, b) * H + j;
      float* floats = args.float_states.last[0];
      floats ? write(floats + at) : write(args.last[0] + at);
    } else if (is_cut(layer, time_after(layer, t), b)) {
      fill_zeros(next, width);
    } else {
      write(next);
    }
  }

  void run(const Runtime& runtime) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const Slice slice = part.slice;
    const Columns columns = part.columns;
    PairTile tile;
    alignas(64) float sums[Cell::sums * kBlock];

    read_inputs(0);
    read_states(0);
    if (part.team) barrier(*part.team, runtime);
    for (int64_t s = 0; s < layout.T; ++s) {
      if (s + 1 < layout.T) read_states(s + 1);
      // The last step of a stretch reads the inputs of the next stretch, so that the barrier after
      // the step also waits for these.
      if ((s + 1) % rows.steps == 0) read_inputs(s + 1);
      if (rows.projected && s % rows.steps == 0 && slice.begin < slice.end) project(tile, s);
      const int64_t t = time_of(layer, s);
      const Step step{t, continued_end(layer, t, slice),
                      alive_end(layout, time_after(layer, t), slice), rows.states[(s + 1) % 2]};
      const int64_t end = alive_end(layout, t, slice);
      for (int64_t j = columns.first; j < columns.last; j += w) {
        if (packs) panels.pack(layer, j / w);
        const int64_t width = min64(w, columns.last - j);
        for (int64_t i = slice.begin; i < end; i += PairTile::rows) {
          const int64_t height = min64(PairTile::rows, end - i);
          multiply(tile, s, i, height, j, sums);
          for (int64_t r = 0; r < height; ++r) finish(step, i + r, j, width, sums + r * w);
        }
      }
      if (part.team && s + 1 < layout.T) barrier(*part.team, runtime);
    }
  }
};

template <class Cell, class Storage, int kTerms>
inline PlanArguments pair_plan_arguments(const Layer<Storage>& layer, const Runtime& runtime) {
  return {layer.layout,
          runtime.machine,
          layer.D,
          layer.H,
          panel_count<float>(layer.H),
          kTerms * sizeof(BFloat16),
          Cell::weight_blocks};
}

// Allocates the rows of one group, for a slice of this many sequences.
template <class Cell, class Storage, int kTerms>
PairRows<kTerms> pair_rows(const Layer<Storage>& layer, const Plan& plan, int64_t sequences,
                           const Runtime& runtime) {
  PairRows<kTerms> rows{};
  const int64_t ahead = choose_pair_steps(
      pair_plan_arguments<Cell, Storage, kTerms>(layer, runtime), plan, PairTile::rows);
  rows.steps = max64(1, ahead);
  rows.capacity = rows.steps * sequences + PairTile::rows;
  const auto allocate = [&](int64_t count, int64_t width) {
    const Terms<kTerms> terms = scratch_terms<kTerms>(runtime, count * padded(width));
    if (padded(width) > width) fill_zeros(terms, count * padded(width));
    return terms;
  };
  for (auto& states : rows.states) states = allocate(sequences + PairTile::rows, layer.H);
  for (auto& inputs : rows.inputs) inputs = allocate(rows.capacity, layer.D);
  if (ahead) {
    constexpr int64_t w = Shape<float>::panel_width;
    rows.projected = scratch<float>(
        runtime, panel_count<float>(layer.H) * Cell::weight_blocks * rows.capacity * w);
  }
  return rows;
}

// Returns how many threads to use for packing all weights.
template <class Cell, class Storage>
inline int64_t choose_packers(const Layer<Storage>& layer, const Machine& machine) {
  const double elements = double(Cell::weight_blocks * layer.H) * double(layer.D + layer.H);
  return min64(panel_count<float>(layer.H), choose_workers(kPackingCost * elements, machine));
}

template <class Cell, class Storage, int kTerms>
void forward_pairs(const Forward<Storage>& args, const Runtime& runtime) {
  using Panels = PairPanels<Cell, Storage, kTerms>;
  using ThePart = PairPart<Cell, Storage, kTerms>;
  const Layer<Storage>& layer = args.layer;
  // The layer's panels, if these kernels read their format.
  const void* prepared = std::is_same_v<Storage, BFloat16> ? layer.panels : nullptr;
  if (!prepared && layer.in_place.weight_hh && (has_table(layer) || layer.in_place.weight_ih)) {
    // The instructions for pairs need weights in panels, so the float kernels run this call.
    const KernelsFor<Storage>& in_float = kKernelsInFloat.cells[size_t(Cell::kind)];
    Forward<Storage> floats = args;
    if (layer.panels) floats.layer.in_place = {};
    return in_float.forward(floats, runtime);
  }
  // A single step reads every panel once. So each member packs one unit block at a time, which then
  // stays in its private cache, and the members split the packing, which takes most of the time.
  const bool one_step = layer.layout.T == 1 && !prepared;
  const Plan plan = one_step
                        ? Plan{1, choose_packers<Cell>(layer, runtime.machine), 0}
                        : choose_plan(pair_plan_arguments<Cell, Storage, kTerms>(layer, runtime));
  Team* teams = scratch<Team>(runtime, plan.groups);
  const size_t block = (Panels::block_bytes(layer.D, layer.H) + 63) / 64 * 64;
  const WeightCopies copies =
      one_step ? WeightCopies{static_cast<char*>(runtime.scratch(plan.members * block)), 0, true}
               : weight_copies<Panels>(layer, prepared, plan, runtime);
  auto* rows = scratch<PairRows<kTerms>>(runtime, plan.groups);
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Slice slice = slice_of(layer.layout, g, plan.groups);
    rows[g] = pair_rows<Cell, Storage, kTerms>(layer, plan, slice.end - slice.begin, runtime);
  }
  float* carried = nullptr;
  if (ThePart::carried_state >= 0) {
    carried = scratch<float>(runtime, layer.layout.B * ThePart::state_size(layer.H));
  }
  const bool one_row = !layer.batch_invariant && layer.layout.B == 1;
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const auto panels = one_step ? Panels(copies.memory + part.member * block, layer.D, layer.H, 1)
                                 : weights_for<Panels>(part, layer, copies);
    ThePart{args, panels, part, rows[part.group], carried, one_row, one_step}.run(runtime);
  });
}

}  // namespace
}  // namespace namernn_fast
