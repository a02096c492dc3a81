// Runs the forward pass with products of encoded rows: bfloat16 terms (terms.h) or 8-bit integers
// (int8_rows.h). Inputs and states are encoded row by row; sums are floats.
//
// Two arrays of states alternate: each step reads one array and writes its states to the other. The
// carried state, which the next step reads elementwise, stays in float. It is the cell state, or h
// if the cell is not only_through_sums.
//
// The template parameter Encoding has these members:
// - Tile: computes a tile of a product, like PairTile in pair_panels.h;
// - Operands: the operands of a product;
// - Row: points to an encoded row. input_size(n) and row_size(n) are the row strides for n inputs
//   and for n states;
// - State: points to a row of states as a step writes it. State is Row, or float* if only complete
//   rows can be encoded. state_size(n) is the row stride for n states;
// - Panels<Storage>: the format of the weights;
// - weight_bytes: the size of a weight;
// - speed: the rate of its multiply-adds, relative to floats;
// - operands_of_inputs(row, n, panel) and operands_of_states(row, n, panel): return the operands
//   that multiply rows of n numbers by a panel;
// - encode(from, row, n), and encode_state(state, row, n) if State is not Row: encode a row;
// - scratch_rows(runtime, rows, n, size): allocates rows of n numbers with stride `size`,
//   whose padding is safe for products to read.
#pragma once

#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

template <class Encoding>
constexpr bool states_are_encoded =
    std::is_same_v<typename Encoding::State, typename Encoding::Row>;

// Memory for the rows of one group.
template <class Encoding>
struct EncodedRows {
  // [B, state_size(H)] each: step s reads states[s % 2].
  typename Encoding::State states[2];
  // [steps * B, input_size(D)] each: the n-th stretch of `steps` steps reads inputs[n % 2].
  typename Encoding::Row inputs[2];
  // [members, encoded_rows, row_size(H)]: each member's encoded states; null if states_are_encoded.
  typename Encoding::Row encoded;
  int64_t encoded_rows;
  int64_t steps;  // steps per stretch; the inputs of a stretch are read together
  // The projection [unit blocks, gates, capacity, panel_width], or null if not computed ahead.
  float* projected;
  int64_t capacity;  // number of rows in `inputs` and `projected`
};

// Runs the forward pass of one part.
template <class Storage, class Encoding>
struct EncodedPart {
  using Tile = typename Encoding::Tile;
  using Row = typename Encoding::Row;
  using State = typename Encoding::State;
  using Operands = typename Encoding::Operands;
  static constexpr int64_t w = Shape<float>::panel_width;
  static constexpr int64_t kBlock = Tile::rows * w;  // number of elements in a tile of sums

  const Forward<Storage>& args;
  const typename Encoding::template Panels<Storage>& panels;
  const Part& part;
  const EncodedRows<Encoding>& rows;
  float* carried;  // [B, carried_size(H)], the carried state; null if the cell has none
  bool one_row;    // whether products use multiply_row(), for a batch of one sequence
  bool packs;      // whether the part packs each unit block just before its products

  // Returns the index of the carried state, which is always the cell's last state. Returns -1 if
  // the cell has no carried state.
  static int carried_state(const Cell& cell) {
    NAMERNN_EXPECT(!needs_floats(cell));
    return carried_states(cell) == 0 ? -1 : int(cell.states) - 1;
  }
  // Returns the number of elements in a row of `carried`, which consists of whole vectors.
  static int64_t carried_size(int64_t H) { return panel_count<float>(H) * w; }

  // Returns the index of row (s, b) in `inputs` and `projected`.
  int64_t row_of(int64_t s, int64_t b) const {
    return s % rows.steps * (part.slice.end - part.slice.begin) + b - part.slice.begin;
  }
  const Row& inputs_at(int64_t s) const { return rows.inputs[s / rows.steps % 2]; }
  Row input_at(int64_t s, int64_t b) const {
    return inputs_at(s) + row_of(s, b) * Encoding::input_size(args.layer.D);
  }
  // Return the h of sequence b that step s reads, either as the cell wrote it or encoded.
  State written_state(int64_t s, int64_t b) const {
    return rows.states[s % 2] + (b - part.slice.begin) * Encoding::state_size(args.layer.H);
  }
  Row encoded_state(int64_t s, int64_t b) const {
    if constexpr (states_are_encoded<Encoding>) {
      return written_state(s, b);
    } else {
      const int64_t row = part.member * rows.encoded_rows + b - part.slice.begin;
      return rows.encoded + row * Encoding::row_size(args.layer.H);
    }
  }
  float* projected_at(int64_t j, int64_t s, int64_t row) const {
    return rows.projected + ((j / w * args.layer.cell->gates + s) * rows.capacity + row) * w;
  }

  // Encodes this member's rows of the inputs, for the stretch that starts at step `first`.
  void read_inputs(int64_t first) const {
    const Layer<Storage>& layer = args.layer;
    if (layer.D == 0) return;
    for (int64_t s = first; s < min64(first + rows.steps, layer.layout.T); ++s) {
      const int64_t t = time_of(layer, s);
      const int64_t end = alive_end(layer.layout, t, part.slice);
      for (int64_t b = part.slice.begin + part.member; b < end; b += part.members) {
        Encoding::encode(input_row(layer, t, b), input_at(s, b), layer.D);
      }
    }
  }

  // Copies the initial h of this member's sequences that start at step s. The previous step writes
  // the h of all other sequences.
  void read_states(int64_t s) const {
    const Layer<Storage>& layer = args.layer;
    const int64_t t = time_of(layer, s);
    const int64_t end = alive_end(layer.layout, t, part.slice);
    const int64_t first = continued_end(layer, t, part.slice);
    for (int64_t b = part.slice.begin + part.member; b < end; b += part.members) {
      if (b < first) continue;
      const State state = written_state(s, b);
      const float* floats = args.float_states.initial[0];
      floats ? convert(floats + b * layer.H, state, layer.H)
             : read_start(starting_state(layer, 0, t, b), 0, layer.H, state);
    }
  }

  // Encodes the states that step s reads.
  void encode_states(int64_t s) const {
    if constexpr (!states_are_encoded<Encoding>) {
      const Layer<Storage>& layer = args.layer;
      const int64_t end = alive_end(layer.layout, time_of(layer, s), part.slice);
      for (int64_t b = part.slice.begin; b < end; ++b) {
        Encoding::encode_state(written_state(s, b), encoded_state(s, b), layer.H);
      }
    }
  }

  // Projects the inputs of the stretch that starts at step `first`.
  void project(Tile& tile, int64_t first) const {
    const Layer<Storage>& layer = args.layer;
    const int64_t last = min64(first + rows.steps, layer.layout.T);
    const int64_t row = Encoding::input_size(layer.D);
    const int64_t count = row_of(last - 1, part.slice.end - 1) + 1;
    for (int64_t j = part.columns.first; j < part.columns.last; j += w) {
      const auto project_sum = [&](int64_t s, const auto& input_panel, const auto&) {
        for (int64_t i = 0; input_panel && i < count; i += Tile::rows) {
          const Operands operands =
              Encoding::operands_of_inputs(inputs_at(first) + i * row, layer.D, input_panel);
          tile.multiply(&operands, 1, min64(Tile::rows, count - i), nullptr, projected_at(j, s, i));
        }
      };
      panels.for_each_panel(layer, j / w, project_sum);
    }
  }

  // Computes the sums of `height` rows, starting at row (s, b), for the unit block that starts at
  // unit j.
  void multiply(Tile& tile, int64_t step, int64_t b, int64_t height, int64_t j, float* sums) const {
    const int64_t D = args.layer.D;
    const int64_t H = args.layer.H;
    const auto sum = [&](int64_t s, const auto& input_panel, const auto& state_panel) {
      Operands operands[2];
      int count = 0;
      const float* start = nullptr;
      if (input_panel && rows.projected) {
        start = projected_at(j, s, row_of(step, b));
      } else if (input_panel && D > 0) {
        operands[count++] = Encoding::operands_of_inputs(input_at(step, b), D, input_panel);
      }
      if (state_panel) {
        operands[count++] = Encoding::operands_of_states(encoded_state(step, b), H, state_panel);
      }
      float* c = sums + s * kBlock;
      one_row ? tile.multiply_row(operands, count, start, c)
              : tile.multiply(operands, count, height, start, c);
    };
    panels.for_each_panel(args.layer, j / w, sum);
  }

  // Adds the start values to the sums of `width` units, starting at unit j: the biases and, if
  // there is a token table, its row for (t, b).
  void add_starts(int64_t t, int64_t b, int64_t j, int64_t width, float* sums) const {
    const Layer<Storage>& layer = args.layer;
    const Cell& cell = *layer.cell;
    const bool biased = layer.table.biased != nullptr;
    const Storage* looked_up =
        has_table(layer) ? table_row(layer, t, b, cell.gates * layer.H) + j : nullptr;
    const float* bias = panels.bias_of(cell, j / w);
    for (int64_t s = 0; s < cell.sums; ++s, bias += w, sums += kBlock) {
      const Storage* row =
          looked_up && s < cell.gates ? looked_up + cell.input_block[s] * layer.H : nullptr;
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
    State next;             // the states that the next step reads
  };

  // Returns the cell's arguments for units j .. j + width of `rows` rows that start at row (t, b).
  // `sums` holds their sums.
  StateRows<Storage> state_rows(int64_t t, int64_t b, int64_t rows, int64_t j, int64_t width,
                                float* sums) const {
    const Layer<Storage>& layer = args.layer;
    const Cell& cell = *layer.cell;
    StateRows<Storage> result{};
    result.range = {0, rows, 0, width};
    result.H = layer.H;
    result.activation = layer.activation;
    result.program = cell.program;
    result.sums = {sums, w};
    result.sum_stride = kBlock;
    result.states[0] = {sums, w};
    if (const int i = carried_state(cell); i >= 0) {
      const int64_t stride = carried_size(layer.H);
      result.states[i] = {carried + b * stride + j, stride};
      result.previous[i] = {result.states[i].data, stride};
    }
    result.kept = rows_from(args.kept, layer.layout, t, b, j);
    for (int i = 0; i < cell.inputs; ++i) {
      result.inputs[i] = rows_from(layer.inputs[i], layer.layout, t, b, j);
    }
    panels.own.set(cell, panels.own_unit(j / w), result);
    return result;
  }

  // Computes the states of units j .. j + width from their sums, for `height` rows from sequence b.
  void finish(const Step& step, int64_t b, int64_t height, int64_t j, int64_t width,
              float* sums) const {
    const Layer<Storage>& layer = args.layer;
    const CellCode<Storage>& code = *layer.cell;
    for (int64_t r = 0; r < height; ++r) {
      add_starts(step.t, b + r, j, width, sums + r * w);
      read_carried(step, b + r, j, width);
    }
    // Rows with an `origin` are not evenly spaced, so the cell gets one row at a time.
    const bool apart = layer.layout.origin && (args.kept.data || layer.cell->inputs);
    const int64_t rows = apart ? 1 : height;
    for (int64_t r = 0; r < height; r += rows) {
      const auto states = state_rows(step.t, b + r, rows, j, width, sums + r * w);
      code.states_of(states);
      for (int64_t n = 0; n < rows; ++n) write_states(step, b + r + n, j, states, n);
    }
  }

  // If sequence b starts or restarts at this step, reads units j .. j + width of its carried state.
  void read_carried(const Step& step, int64_t b, int64_t j, int64_t width) const {
    const Layer<Storage>& layer = args.layer;
    const int i = carried_state(*layer.cell);
    if (i < 0 || (b < step.continued_end && !is_cut(layer, step.t, b))) return;
    float* state = carried + b * carried_size(layer.H) + j;
    const float* floats = args.float_states.initial[i];
    floats ? convert(floats + b * layer.H + j, state, width)
           : read_start(starting_state(layer, i, step.t, b), j, width, state);
  }

  // Stores row n of `states`: the states of sequence b, starting at unit j. Writes h to the output.
  // Also writes h for the next step or, if the sequence ends, all states to `last`.
  void write_states(const Step& step, int64_t b, int64_t j, const StateRows<Storage>& states,
                    int64_t n) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const int64_t H = layer.H, width = states.range.units;
    const int64_t t = step.t, last_at = place_of(layout, b) * H + j;
    const bool continues = b < step.continues_end;
    for (int i = 1; i < layer.cell->states && !continues; ++i) {
      const float* state = states.states[i].data + n * states.states[i].stride;
      float* floats = args.float_states.last[i];
      floats ? convert(state, floats + last_at, width)
             : convert(state, args.last[i] + last_at, width);
    }
    const float* h = states.states[0].data + n * states.states[0].stride;
    // Always loads whole vectors: partial loads of vectors that were just written are slow.
    const auto write = [h, width](const auto& to) {
      for_each_vector<float>(width,
                             [=](int64_t c, int64_t m) { store_upto(to + c, load(h + c), m); });
    };
    if (args.output.data) write(row_at(args.output, layout, t, b) + j);
    const State next = step.next + ((b - part.slice.begin) * Encoding::state_size(H) + j);
    if (!continues) {
      float* floats = args.float_states.last[0];
      floats ? write(floats + last_at) : write(args.last[0] + last_at);
    } else if (const int64_t after = time_after(layer, t); is_cut(layer, after, b)) {
      read_start(restart_state(layer.reset_to[0], layout, after, b), j, width, next);
    } else {
      write(next);
    }
  }

  void run(const Runtime& runtime) const {
    const Layer<Storage>& layer = args.layer;
    const SequenceLayout& layout = layer.layout;
    const Slice slice = part.slice;
    const Columns columns = part.columns;
    Tile tile;
    alignas(64) float sums[kMostSums * kBlock];

    read_inputs(0);
    read_states(0);
    if (part.team) barrier(*part.team, runtime);
    for (int64_t s = 0; s < layout.T; ++s) {
      if (s + 1 < layout.T) read_states(s + 1);
      // The last step of a stretch reads the inputs of the next stretch, so that the barrier after
      // the step also waits for these inputs.
      if ((s + 1) % rows.steps == 0) read_inputs(s + 1);
      if (rows.projected && s % rows.steps == 0 && slice.begin < slice.end) project(tile, s);
      const int64_t t = time_of(layer, s);
      const Step step{t, continued_end(layer, t, slice),
                      alive_end(layout, time_after(layer, t), slice), rows.states[(s + 1) % 2]};
      const int64_t end = alive_end(layout, t, slice);
      encode_states(s);
      const int64_t blocks = (columns.last - columns.first + w - 1) / w;
      for (int64_t n = 0; n < blocks; ++n) {
        // Every other step reads the panels in reverse order. If the cache does not hold all
        // panels, such a step starts with panels that are still cached.
        const int64_t j = columns.first + (s % 2 ? blocks - 1 - n : n) * w;
        if (packs) panels.pack(layer, j / w);
        const int64_t width = min64(w, columns.last - j);
        for (int64_t i = slice.begin; i < end; i += Tile::rows) {
          const int64_t height = min64(Tile::rows, end - i);
          multiply(tile, s, i, height, j, sums);
          finish(step, i, height, j, width, sums);
        }
      }
      if (part.team && s + 1 < layout.T) barrier(*part.team, runtime);
    }
  }
};

template <class Encoding, class Storage>
inline PlanArguments encoded_plan_arguments(const Layer<Storage>& layer, const Runtime& runtime) {
  return arguments_of_plan(Pass::forward, layer, runtime, Encoding::weight_bytes, Encoding::speed);
}

// Allocates the rows of a group that computes `sequences` sequences.
template <class Encoding, class Storage>
EncodedRows<Encoding> encoded_rows(const Layer<Storage>& layer, const Plan& plan, int64_t sequences,
                                   const Runtime& runtime) {
  constexpr int64_t tile_rows = Encoding::Tile::rows;
  EncodedRows<Encoding> rows{};
  const int64_t ahead =
      choose_encoded_steps(encoded_plan_arguments<Encoding>(layer, runtime), plan, tile_rows);
  rows.steps = max64(1, ahead);
  rows.capacity = rows.steps * sequences + tile_rows;
  rows.encoded_rows = sequences + tile_rows;
  for (auto& inputs : rows.inputs) {
    inputs = Encoding::scratch_rows(runtime, rows.capacity, layer.D, Encoding::input_size(layer.D));
  }
  for (auto& states : rows.states) {
    if constexpr (states_are_encoded<Encoding>) {
      states =
          Encoding::scratch_rows(runtime, rows.encoded_rows, layer.H, Encoding::row_size(layer.H));
    } else {
      states = scratch<float>(runtime, sequences * Encoding::state_size(layer.H));
    }
  }
  if constexpr (!states_are_encoded<Encoding>) {
    rows.encoded = Encoding::scratch_rows(runtime, plan.members * rows.encoded_rows, layer.H,
                                          Encoding::row_size(layer.H));
  }
  if (ahead) {
    constexpr int64_t w = Shape<float>::panel_width;
    rows.projected = scratch<float>(
        runtime, panel_count<float>(layer.H) * layer.cell->gates * rows.capacity * w);
  }
  return rows;
}

// Returns the number of threads that pack the weights.
template <class Storage>
inline int64_t choose_packers(const Layer<Storage>& layer, const Machine& machine) {
  const double elements = double(layer.cell->gates * layer.H) * double(layer.D + layer.H);
  return min64(panel_count<float>(layer.H), choose_workers(kPackingCost * elements, machine));
}

// Runs the forward pass. `prepared` points to the layer's panels in the format Encoding::Panels, or
// is null if the layer has no such panels.
template <class Encoding, class Storage>
void forward_encoded(const Forward<Storage>& args, const void* prepared, const Runtime& runtime) {
  using Panels = typename Encoding::template Panels<Storage>;
  using ThePart = EncodedPart<Storage, Encoding>;
  const Layer<Storage>& layer = args.layer;
  // A single step reads every panel only once, and packing takes most of the time. So the members
  // split the packing, and each packs one unit block at a time, which stays in its private cache.
  const bool one_step = layer.layout.T == 1 && !prepared;
  const Plan plan = one_step ? Plan{1, choose_packers(layer, runtime.machine), 0}
                             : choose_plan(encoded_plan_arguments<Encoding>(layer, runtime));
  Team* teams = scratch<Team>(runtime, plan.groups);
  const size_t block = (Panels::block_bytes(layer) + 63) / 64 * 64;
  const WeightCopies copies =
      one_step ? WeightCopies{static_cast<char*>(runtime.scratch(plan.members * block)), 0, true}
               : weight_copies<Panels>(layer, prepared, plan, runtime);
  auto* rows = scratch<EncodedRows<Encoding>>(runtime, plan.groups);
  for (int64_t g = 0; g < plan.groups; ++g) {
    const Slice slice = slice_of(layer.layout, g, plan.groups);
    rows[g] = encoded_rows<Encoding>(layer, plan, slice.end - slice.begin, runtime);
  }
  float* carried = nullptr;
  if (ThePart::carried_state(*layer.cell) >= 0) {
    carried = scratch<float>(runtime, layer.layout.B * ThePart::carried_size(layer.H));
  }
  const bool one_row = !layer.batch_invariant && layer.layout.B == 1;
  run_plan(plan, layer, runtime, teams, [&](const Part& part) {
    const auto panels = one_step ? Panels(copies.memory + part.member * block, layer, 1)
                                 : weights_for<Panels>(part, layer, copies);
    ThePart{args, panels, part, rows[part.group], carried, one_row, one_step}.run(runtime);
  });
}

}  // namespace
}  // namespace namernn_fast
