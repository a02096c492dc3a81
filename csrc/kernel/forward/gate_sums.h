// Computes the states of a part of the forward pass, for cells with several sums per hidden unit.
// Works on one unit block and a few rows at a time, in a small buffer that stays in cache. If the
// cell needs whole rows, works on all unit blocks of a few rows.
#pragma once

#include "kernel/forward/forward_part.h"

namespace namernn_fast {
namespace {

// Maximum number of sums per unit in the buffer, over all rows of a chunk. Each chunk of rows reads
// the panels of the unit block again.
constexpr int64_t kBufferSums = 64 * kTileRows;
static_assert(kBufferSums / kMostSums >= 2 * kTileRows);

template <class Scalar, class Storage, class Element>
struct GateSums : ForwardContext<Scalar, Storage, Element> {
  using Context = ForwardContext<Scalar, Storage, Element>;
  using Context::args, Context::weights, Context::part, Context::memory;
  using Context::projected_steps, Context::w;

  // The rows of one step that advance() computes.
  struct StepRows {
    int64_t t;
    int64_t b;        // the first sequence
    const Scalar* h;  // the previous h of the first sequence; null if no product is needed
    int64_t h_stride;
    const Scalar* const* looked_up;  // rows of the token table; null without a table
  };

  // Where the sums of one unit block are in the rows of a step.
  struct SumRows {
    Scalar* data;
    int64_t stride;      // stride between rows
    int64_t sum_stride;  // stride between the sums of a unit
  };

  // Returns the number of sums in a unit block of a row, [sums, w].
  int64_t block_sums() const { return args.layer.cell->sums * w; }
  // Returns the number of elements in a row of the projection: H for each sum that the input
  // contributes to, in order.
  int64_t projected_row() const { return args.layer.cell->gates * args.layer.H; }
  // Returns a pointer to row (t, b) of a projection that starts at time `first`.
  Scalar* projected_at(int64_t first, int64_t t, int64_t b) const {
    const int64_t width = part.slice.end - part.slice.begin;
    const int64_t row = (t - first) * width + b - part.slice.begin;
    return memory.projected + (part.group * memory.projected_rows + row) * projected_row();
  }

  // Writes the projection of the inputs plus the biases to memory.projected, for projected_steps
  // steps starting at step s.
  void project(int64_t s) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t width = part.slice.end - part.slice.begin;
    const int64_t first = this->projected_times(s).first;
    const Cell& cell = *layer.cell;
    this->for_each_projected_run(s, !layer.layout.count, [&](const Run& run) {
      const Scalar* x = input_row(layer, run.t, run.b);
      const int64_t stride = run_stride(layer.input, run);
      Scalar* rows = projected_at(first, run.t, run.b);
      const int64_t row_stride = projected_row() * (run.along_time ? width : 1);
      for (int64_t j = part.columns.first; j < part.columns.last; j += w) {
        for (int64_t g = 0; g < cell.gates; ++g) {
          const Scalar* bias = weights.bias + (j / w * cell.sums + g) * w;
          const Target<Scalar> target{rows + g * layer.H + j, row_stride, bias, 0, false};
          const bool last = g + 1 == cell.gates;
          const Element* after = last ? panel_at(unit_block_after(j), 0, 0) : panel_at(j, g + 1, 0);
          multiply_input(x, stride, target, run.rows, g, j, after);
        }
      }
    });
  }

  // Computes the states of sequences begin .. end at time t. `h` points to the previous h of the
  // first sequence; if `h` is null, all previous states are zeros.
  void advance(int64_t t, int64_t begin, int64_t end, const Scalar* h, int64_t h_stride) const {
    const Layer<Scalar>& layer = args.layer;
    const CellCode<Scalar>& code = *layer.cell;
    StateRows<Scalar> states = this->state_rows(t, begin, !h);
    states.sum_stride = w;
    if (h && !layer.cell->only_through_sums) states.previous[0] = {h, h_stride};
    // Zero times infinity is NaN, so a zero state skips the product only if weight_hh is finite.
    if (!h && !weights.finite) h = weights.zeros, h_stride = 0;
    const Scalar* const* looked_up = has_table(layer) ? this->look_up(t, begin, end) : nullptr;
    const StepRows step{t, begin, layer.cell->has_weight_hh ? h : nullptr, h_stride, looked_up};
    const int64_t rows = end - begin;
    if (layer.cell->states_need_rows) return advance_whole_rows(step, rows, states);
    const int64_t most_rows = kBufferSums / layer.cell->sums;
    const int64_t chunks = (rows + most_rows - 1) / most_rows;
    for (int64_t j = part.columns.first; j < part.columns.last; j += w) {
      for (int64_t c = 0, i = 0; c < chunks; ++c) {
        const int64_t height = rows * (c + 1) / chunks - i;
        // The first unit of the unit block that is read after this chunk.
        const int64_t next = c + 1 < chunks ? j : unit_block_after(j);
        alignas(64) Scalar sums[kBufferSums * w];
        compute_sums(step, i, height, j, next, {sums, block_sums(), w});
        states.range = {i, height, j, columns_from(j)};
        states.sums = {sums, block_sums()};
        code.states_of(states);
        i += height;
      }
    }
  }

 private:
  // Computes the states of `rows` rows, with the sums of whole rows in memory.sums.
  void advance_whole_rows(const StepRows& step, int64_t rows, StateRows<Scalar> states) const {
    const CellCode<Scalar>& code = *args.layer.cell;
    const int64_t chunks = (rows + memory.sum_rows - 1) / memory.sum_rows;
    Scalar* const sums = memory.sums + part.group * memory.sum_rows * memory.sum_stride;
    const int64_t sum_stride = panel_count<Scalar>(args.layer.H) * w;
    states.sum_stride = sum_stride;
    states.sums = {sums, memory.sum_stride};
    states.row_registers = memory.row_registers.data + part.group * memory.row_registers.stride;
    for (int64_t c = 0, i = 0; c < chunks; ++c) {
      const int64_t height = rows * (c + 1) / chunks - i;
      for (int64_t j = 0; j < args.layer.H; j += w) {
        compute_sums(step, i, height, j, unit_block_after(j),
                     {sums + j, memory.sum_stride, sum_stride});
      }
      states.range = {i, height, 0, args.layer.H};
      code.states_of(states);
      i += height;
    }
  }

  // Computes the sums of rows i .. i + height of a step, for the unit block that starts at unit j.
  // `next` is the first unit of the unit block that is read afterwards.
  void compute_sums(const StepRows& step, int64_t i, int64_t height, int64_t j, int64_t next,
                    SumRows sums) const {
    const Layer<Scalar>& layer = args.layer;
    const bool projects = layer.D > 0 && !projected_steps;
    start_sums(step, i, height, j, sums);
    if (projects) {
      const auto operand =
          this->projection(input_row(layer, step.t, step.b + i), layer.input.row_stride);
      multiply_panels(operand, sums, height, j, {j, j + columns_from(j)}, panel_at(j, 0, layer.D));
    }
    if (!step.h) return;
    const Element* after = panel_at(next, 0, projects ? 0 : layer.D);
    multiply_state(step.h + i * step.h_stride, step.h_stride, sums, height, j, after);
  }

  int64_t columns_from(int64_t j) const { return min64(w, part.columns.last - j); }

  // Returns the first unit of the unit block that is read after the unit block at unit j. After its
  // last unit block, a part reads its first unit block again.
  int64_t unit_block_after(int64_t j) const {
    return j + w < part.columns.last ? j + w : part.columns.first;
  }

  // Returns a pointer to a row of the panel of weight block g, in the unit block that starts at
  // unit j. The rows of weight_hh start at row D.
  const Element* panel_at(int64_t j, int64_t g, int64_t row) const {
    const int64_t panel = j / w * args.layer.cell->gates + g;
    return weights.weights + (panel * (args.layer.D + recurrent_size(args.layer)) + row) * w;
  }

  // Sets the sums of rows i .. i + height of a step to their start values, for the unit block that
  // starts at unit j.
  void start_sums(const StepRows& step, int64_t i, int64_t height, int64_t j, SumRows sums) const {
    const Layer<Scalar>& layer = args.layer;
    const Cell& cell = *layer.cell;
    const int64_t H = layer.H;
    const Scalar* bias = weights.bias + j / w * block_sums();
    const int64_t width = columns_from(j);
    const int64_t first = projected_steps ? first_projected(step.t) : 0;
    for (int64_t r = i; r < i + height; ++r, sums.data += sums.stride) {
      const int64_t b = step.b + r;
      const Scalar* projected = projected_steps ? projected_at(first, step.t, b) + j : nullptr;
      const Scalar* given = layer.sums_given ? input_row(layer, step.t, b) + j : nullptr;
      for (int64_t s = 0; s < cell.sums; ++s) {
        const Scalar* start = bias + s * w;
        if (s < cell.gates && projected) start = projected + s * H;
        if (s < cell.gates && step.looked_up) {
          start = step.looked_up[r] + cell.input_block[s] * H + j;
        }
        Scalar* to = sums.data + s * sums.sum_stride;
        width == w ? copy_panel_row(start, to)
                   : void(std::memcpy(to, start, width * sizeof(Scalar)));
        if (s < cell.gates && given) add(given + cell.input_block[s] * H, to, width);
      }
    }
  }

  static void copy_panel_row(const Scalar* from, Scalar* to) {
    for (int64_t v = 0; v < w; v += Simd<Scalar>::lanes) store(to + v, load(from + v));
  }

  // Returns the first time of the projection that includes time t.
  int64_t first_projected(int64_t t) const {
    const int64_t s = time_of(args.layer, t);  // time_of() is its own inverse
    return this->projected_times(s / projected_steps * projected_steps).first;
  }

  // Multiplies inputs by the block of weight_ih that contributes to sum g, for the unit block that
  // starts at unit j. `after` is the panel that the next product reads.
  void multiply_input(const Scalar* x, int64_t stride, const Target<Scalar>& target, int64_t rows,
                      int64_t g, int64_t j, const Element* after) const {
    const int64_t D = args.layer.D;
    if (weights.weight_ih) {
      const Storage* block =
          weights.weight_ih + (args.layer.cell->input_block[g] * args.layer.H + j) * D;
      const OperandInPlace<Scalar, Storage> operand{x, stride, block, D};
      return product_in_place(operand, target, rows, 0, columns_from(j), NoFinish());
    }
    const Operand<Scalar, Element> operand = operand_of(this->projection(x, stride), g, j, after);
    product<Scalar>(&operand, 1, target, rows, 0, columns_from(j), NoFinish());
  }

  // Multiplies previous states by all blocks of weight_hh and adds the products to `sums`, for the
  // unit block that starts at unit j. `after` is the panel that the next product reads.
  void multiply_state(const Scalar* h, int64_t stride, SumRows sums, int64_t rows, int64_t j,
                      const Element* after) const {
    const Layer<Scalar>& layer = args.layer;
    const int64_t H = layer.H, R = recurrent_size(layer);
    sums.data += layer.cell->first_state_sum * sums.sum_stride;
    for_each_head(layer, {j, j + columns_from(j)}, [&](int64_t head, Columns units) {
      const Scalar* h_of_head = h + head * R;
      if (!weights.weight_hh) {
        return multiply_panels(this->recurrence(h_of_head, stride), sums, rows, j, units, after);
      }
      for (int64_t g = 0; g < layer.cell->gates; ++g) {
        Scalar* to = sums.data + g * sums.sum_stride + units.first - j;
        const Target<Scalar> target{to, sums.stride, to, sums.stride, false};
        const Storage* block = weights.weight_hh + (g * H + units.first) * R;
        const OperandInPlace<Scalar, Storage> operand{h_of_head, stride, block, R};
        product_in_place(operand, target, rows, 0, units.last - units.first, NoFinish());
      }
    });
  }

  // Multiplies the rows of `rows_of_a` by all weight blocks and adds the products to `sums`, for
  // `units` of the unit block that starts at unit j. If the units fill their panels and the sums
  // are contiguous, computes all weight blocks as one wide product. `after` is the panel that the
  // next product reads.
  void multiply_panels(const Operand<Scalar, Element>& rows_of_a, SumRows sums, int64_t rows,
                       int64_t j, Columns units, const Element* after) const {
    const int64_t columns = units.last - units.first, skipped = units.first - j;
    const bool whole = columns == w && sums.sum_stride == w;
    const int64_t gates = args.layer.cell->gates;
    for (int64_t g = 0; g < (whole ? 1 : gates); ++g) {
      Operand<Scalar, Element> operand = operand_of(rows_of_a, g, j, after);
      // The product reads past the end of each row of the panel, and ignores what it reads there.
      operand.panels += skipped;
      Scalar* to = sums.data + g * sums.sum_stride + skipped;
      const Target<Scalar> target{to, sums.stride, to, sums.stride, false};
      product<Scalar>(&operand, 1, target, rows, 0, whole ? gates * w : columns, NoFinish());
    }
  }

  // Returns a copy of `operand` whose panels start at weight block g of the unit block that starts
  // at unit j. The next panel belongs to weight block g + 1. `after` is the panel that the next
  // product reads.
  Operand<Scalar, Element> operand_of(Operand<Scalar, Element> operand, int64_t g, int64_t j,
                                      const Element* after) const {
    const int64_t panel = (args.layer.D + recurrent_size(args.layer)) * w;
    operand.panels += (j / w * args.layer.cell->gates + g) * panel;
    operand.panel_size = panel;
    if (operand.after) operand.after = after;
    return operand;
  }
};

}  // namespace
}  // namespace namernn_fast
