// Computes the products of the backward pass in float and double. 16-bit types are converted to
// float, except bfloat16 on processors that multiply pairs of bfloat16: see pair_products.h.
// The interface is in products_interface.h.
#pragma once

#include <type_traits>

#include "kernel/backward/gradient_sums.h"
#include "kernel/backward/time_blocks.h"
#include "kernel/products/product.h"
#include "kernel/weights/weights.h"

namespace namernn_fast {
namespace {

constexpr int64_t kMinBlockRows = kOneProductRows;  // lower limit on block_rows()
constexpr int64_t kChunkRows = 256;  // maximum rows of dz in one product of a weight gradient
constexpr int64_t kTaskRows = 96;    // maximum rows of a product that one task computes
// With at most this many rows of dz, a task writes whole rows of a gradient.
constexpr int64_t kFewRows = 64;

template <class StorageType>
struct FloatProducts {
  using Storage = StorageType;
  using Scalar = Compute<Storage>;
  using Elements = Scalar*;
  using Recurrence = RecurrencePanels<Storage>;
  static constexpr int64_t w = Shape<Scalar>::panel_width;
  static constexpr size_t element_bytes = sizeof(Scalar);
  static constexpr bool sums_like_gradient = true;
  static constexpr bool can_project = true;
  static constexpr bool encodes_dz = false;

  const Cell* cell;
  // Memory shared by all groups.
  Scalar* weight_ih;  // panels of W_ih [H, D]; null unless grad_input is wanted
  // [workers, kTaskRows, D]: grad_input before conversion or scattering; null if not needed.
  Scalar* staged;
  // The members below belong to one group; prepare_rows() sets them.
  int64_t D;
  int64_t H;
  int64_t P;
  int64_t R;  // recurrent_size() of the layer
  int64_t heads;
  int64_t capacity;  // maximum number of rows in a time block
  bool prefetch;     // whether to prefetch weight panels: true if they do not stay in cache
  int64_t dz_stride;
  int64_t dz_block;  // stride between the blocks of a row of dz
  Scalar* dz;        // [capacity, dz_stride]: dz and, if the layer projects h, the gradients of h
  // The transpose of dz, [sums * H, transposed_stride], plus P rows if the layer projects h.
  // Products for weight gradients need columns of dz. In the transpose, these columns are rows,
  // which are faster to read. Null if dz stays in the core's private cache, or if no parameter
  // gradients are wanted.
  Scalar* dz_transposed;
  int64_t transposed_stride;
  // Panels of h_{t-1} [capacity, R] for each head, of x [capacity, D] and, if the layer projects h,
  // of h_t before its projection [capacity, H]; null unless parameter gradients are wanted.
  Scalar* previous;
  Scalar* input;
  Scalar* unprojected;

  // Returns the approximate number of rows in a time block, which fill about half of a core's
  // private cache.
  static int64_t block_rows(const Layer<Storage>& layer, const Runtime& runtime) {
    const int64_t row = ((1 + layer.cell->sums) * layer.H + layer.D) * int64_t(sizeof(Scalar));
    return choose_block_rows(row, kMinBlockRows, runtime.machine);
  }

  // Returns the smallest stride of at least n elements that is an odd number of vectors. Such a
  // stride spreads the elements of a column over many cache sets.
  static int64_t odd_vectors(int64_t n) {
    constexpr int64_t lanes = Simd<Scalar>::lanes;
    return ((n + lanes - 1) / lanes | 1) * lanes;
  }

  static int64_t gradient_size(int64_t H, int64_t blocks, int64_t width) {
    return blocks * H * width;
  }

  static void deliver_gradient(const Scalar* sums, Storage* result, int64_t H, int64_t blocks,
                               int64_t width, const Runtime&) {
    deliver(sums, result, blocks * H * width);
  }

  void prepare_input_gradient(const Layer<Storage>& layer, void* panels, const Plan& plan,
                              const Runtime& runtime) {
    weight_ih = panels ? static_cast<Scalar*>(panels)
                       : scratch<Scalar>(runtime,
                                         panels_size<Scalar>(layer.cell->gates * layer.H, layer.D));
    if (!std::is_same_v<Storage, Scalar> || layer.layout.origin) {
      const int64_t workers = max64(runtime.machine.threads, plan.groups * plan.members);
      staged = scratch<Scalar>(runtime, workers * kTaskRows * layer.D);
    }
  }

  void pack_input_panel(const Layer<Storage>& layer, int64_t p) const {
    const int64_t H = layer.H;
    const int64_t D = layer.D;
    for_each_input_blocks(*layer.cell, [&](const Blocks& blocks) {
      pack(layer.parameters[kWeightIh] + blocks.block * H * D, blocks.count * H, D, p * w,
           weight_ih + (p * layer.cell->gates + blocks.sum) * H * w);
    });
  }

  void prepare_rows(const Layer<Storage>& layer, bool want_weights, int64_t rows,
                    const Runtime& runtime) {
    cell = layer.cell;
    D = layer.D;
    H = layer.H;
    P = layer.P;
    R = recurrent_size(layer);
    heads = layer.heads;
    capacity = rows;
    prefetch = leave_cache(Recurrence::bytes(layer), runtime.machine);
    dz_block = H;
    const int64_t columns = cell->sums * H + projected_size(layer);
    dz_stride = odd_vectors(columns);
    dz = scratch<Scalar>(runtime, capacity * dz_stride);
    if (want_weights) {
      if (leave_cache(capacity * dz_stride * int64_t(sizeof(Scalar)), runtime.machine)) {
        transposed_stride = odd_vectors(capacity);
        dz_transposed = scratch<Scalar>(runtime, columns * transposed_stride);
      }
      previous = scratch<Scalar>(runtime, heads * panels_size<Scalar>(capacity, R));
      if (P < H) unprojected = scratch<Scalar>(runtime, panels_size<Scalar>(capacity, H));
      input = scratch<Scalar>(runtime, panels_size<Scalar>(capacity, D));
    }
  }

  Scalar* dz_rows(int64_t row, int64_t first) const { return dz + row * dz_stride + first; }
  void store_dz(int64_t, Columns) const {}

  void keep_row(int64_t row, const Storage* h, const Storage* x, Storage*) const {
    if (!previous) return;
    for (int64_t head = 0; head < heads; ++head) {
      Scalar* panels = previous_of(head);
      const Storage* of_head = h ? h + head * R : nullptr;
      for (int64_t j = 0; j < R; j += w) pack_row(of_head, R, j, panels + j * capacity + row * w);
    }
    for (int64_t j = 0; j < D; j += w) pack_row(x, D, j, input + j * capacity + row * w);
  }

  // Returns the panels of a head's part of h_{t-1}.
  Scalar* previous_of(int64_t head) const {
    return previous + head * panels_size<Scalar>(capacity, R);
  }

  void step_back(int64_t row, const Elements& weight_hh, int64_t rows, Columns columns,
                 Scalar* grad_h) const {
    const int64_t K = cell->gates * H;
    const Scalar* state_dz = dz + row * dz_stride + cell->first_state_sum * H;
    const bool add = !cell->only_through_sums;
    if (heads == 1) {
      const Scalar* first_panel = weight_hh + columns.first * K;
      const Operand<Scalar> operand{
          state_dz, dz_stride, weight_hh, K * w, K, kChain, prefetch ? first_panel : nullptr};
      const Target<Scalar> target{grad_h, P, nullptr, 0, add};
      product<Scalar>(&operand, 1, target, rows, columns.first, columns.last, NoFinish());
      return;
    }
    for (int64_t unit = columns.first / R * R; unit < columns.last; unit += R) {
      Operand<Scalar> of_gates[kMostGates];
      for (int64_t g = 0; g < cell->gates; ++g) {
        const int64_t first = g * H + unit;
        of_gates[g] = {state_dz + first, dz_stride, weight_hh + first * w, K * w, R};
      }
      const Target<Scalar> target{grad_h + unit, P, nullptr, 0, add};
      product<Scalar>(of_gates, int(cell->gates), target, rows, max64(columns.first - unit, 0),
                      min64(columns.last - unit, R), NoFinish());
    }
  }

  // Returns the address of a row's gradient of h, which is stored after the row's dz.
  Scalar* grad_h(int64_t row) const { return dz + row * dz_stride + cell->sums * H; }

  // Computes `columns` of `grad` = grad_h W_hr for `rows` rows of one time step, like step_back().
  void project_back(int64_t row, const Elements& weight_hr, int64_t rows, Columns columns,
                    Scalar* grad) const {
    const Operand<Scalar> operand{grad_h(row), dz_stride, weight_hr, P * w, P};
    const Target<Scalar> target{grad, H, nullptr, 0, false};
    product<Scalar>(&operand, 1, target, rows, columns.first, columns.last, NoFinish());
  }

  // Stores `columns` of row b of the unprojected `h` [.., H]. No-op if the layer does not project.
  void keep_unprojected(int64_t row, const Scalar* h, int64_t b, Columns columns) const {
    for (int64_t j = columns.first; unprojected && j < columns.last; j += w) {
      pack_row(h + b * H, H, j, unprojected + j * capacity + row * w);
    }
  }

  void end_recurrence(int64_t rows, const Part& part) const {
    if (!dz_transposed) return;
    const auto transpose_columns = [&](int64_t first, Columns columns) {
      const int64_t column = first + columns.first;
      transpose_matrix(dz + column, dz_stride, rows, columns.last - columns.first,
                       dz_transposed + column * transposed_stride, transposed_stride, rows);
    };
    for (int64_t s = 0; s < cell->sums; ++s) transpose_columns(s * H, part.columns);
    if (unprojected) transpose_columns(cell->sums * H, part.outputs);
  }

  void add_weight_gradient(const Blocks& blocks, bool initial, Share& share, int64_t zeros,
                           int64_t rows, const Elements& panels, int64_t width,
                           Scalar* grad) const {
    add_gradient(blocks.sum * H, blocks.count * H, initial, share, zeros, rows, panels, width,
                 grad + blocks.block * H * width);
  }

  // Adds dz^T h_{t-1} to `grad` [gates * H, R], the gradient of a weight_hh with several heads, or
  // overwrites `grad` if `initial`.
  void add_heads_gradient(bool initial, Share& share, int64_t zeros, int64_t rows,
                          Scalar* grad) const {
    for (int64_t g = 0; g < cell->gates; ++g) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t unit = g * H + head * R;
        add_gradient(cell->first_state_sum * H + unit, R, initial, share, zeros, rows,
                     previous_of(head), R, grad + unit * R);
      }
    }
  }

  // Adds grad_h^T X to `grad` [P, H], the gradient of weight_hr, or overwrites `grad` if `initial`.
  // The rows of X are h before its projection. No-op without projections.
  void add_projection_gradient(bool initial, Share& share, int64_t rows, Scalar* grad) const {
    if (!unprojected) return;
    add_gradient(cell->sums * H, P, initial, share, 0, rows, unprojected, H, grad);
  }

  void write_weight_gradient(const Blocks& blocks, Share& share, int64_t zeros, int64_t rows,
                             const Elements& panels, int64_t width, Storage* grad) const {
    if constexpr (std::is_same_v<Storage, Scalar>) {
      add_weight_gradient(blocks, true, share, zeros, rows, panels, width, grad);
    } else {
      constexpr int64_t height = Shape<Scalar>::max_rows;
      alignas(64) Scalar sums[height * w];
      const int64_t M = blocks.count * H, first = blocks.sum * H;
      grad += blocks.block * H * width;
      for (int64_t i = 0; i < M; i += height) {
        if (!take(share)) continue;
        const int64_t tile_rows = min64(height, M - i);
        for (int64_t j = 0; j < width; j += w) {
          const int64_t columns = min64(w, width - j);
          const Target<Scalar> target{sums, w, nullptr, 0, false};
          multiply_columns(Columns{first + i, first + i + tile_rows}, zeros, rows - zeros,
                           panels + j * capacity, target, Columns{0, columns});
          for (int64_t r = 0; r < tile_rows; ++r) {
            convert(sums + r * w, grad + (i + r) * width + j, columns);
          }
        }
      }
    }
  }

  void write_input_gradient(const Backward<Storage>& args, const GroupRows& group,
                            const TimeBlock& block, Share& share, int64_t worker) const {
    const SequenceLayout& layout = args.layer.layout;
    const int64_t width = group.slice.end - group.slice.begin;
    const int64_t base = first_row(group, block.first);
    for_each_run(layout, block.first, block.last, group.slice, is_flat(args.grad_input, layout),
                 !layout.count, [&](const Run& run) {
                   const int64_t run_dz_stride = dz_stride * (run.along_time ? width : 1);
                   const int64_t row = first_row(group, run.t) - base + run.b - group.slice.begin;
                   const Scalar* run_dz = dz + row * dz_stride;
                   for (int64_t i = 0; i < run.rows; i += kTaskRows) {
                     if (!take(share)) continue;
                     write_input_rows(args, run, i, run_dz + i * run_dz_stride, run_dz_stride,
                                      worker);
                   }
                 });
  }

  // Copies dz to args.grad_sums.
  void write_sum_gradients(const Backward<Storage>& args, const GroupRows& group,
                           const TimeBlock& block, Share& share) const {
    const SequenceLayout& layout = args.layer.layout;
    const int64_t base = first_row(group, block.first) + group.slice.begin;
    for (int64_t t = block.first; t < block.last; ++t) {
      const int64_t row = first_row(group, t) - base;
      for (int64_t b = group.slice.begin; b < alive_end(layout, t, group.slice); ++b) {
        if (!take(share)) continue;
        convert(dz + (row + b) * dz_stride, row_at(args.grad_sums, layout, t, b), cell->sums * H);
      }
    }
  }

 private:
  // Adds A^T X to `grad` [M, width], where A is columns first .. first + M of dz. The other
  // arguments are as in add_weight_gradient().
  void add_gradient(int64_t first, int64_t M, bool initial, Share& share, int64_t zeros,
                    int64_t rows, const Elements& panels, int64_t width, Scalar* grad) const {
    // With few rows, writing the gradient takes most of the time, so each task writes whole rows of
    // the gradient in memory order.
    const bool whole_rows = rows <= kFewRows;
    const int64_t task_rows = whole_rows ? Shape<Scalar>::max_rows : kTaskRows;
    const int64_t task_columns = whole_rows ? width : w;
    for (int64_t i = 0; i < M; i += task_rows) {
      for (int64_t j = 0; j < width; j += task_columns) {
        if (!take(share)) continue;
        // Even if all rows of `panels` are zeros, an initial gradient must be written. The loop
        // then runs once, with a product over no rows.
        for (int64_t k = zeros; k < rows || (initial && k == zeros); k += kChunkRows) {
          const Target<Scalar> target{grad + i * width, width, nullptr, 0,
                                      !(initial && k == zeros)};
          multiply_columns(Columns{first + i, first + min64(i + task_rows, M)}, k,
                           min64(kChunkRows, rows - k), panels, target,
                           Columns{j, min64(j + task_columns, width)});
        }
      }
    }
  }

  // Computes `columns` of A^T X, where A is `dz_columns` of dz and `panels` holds X. Uses only rows
  // first .. first + count of A and X.
  void multiply_columns(Columns dz_columns, int64_t first, int64_t count, const Elements& panels,
                        const Target<Scalar>& target, Columns columns) const {
    const int64_t column = dz_columns.first;
    const int64_t M = dz_columns.last - dz_columns.first;
    Operand<Scalar> operand{nullptr, 1, panels + first * w, capacity * w, count};
    if (dz_transposed) {
      operand.a = dz_transposed + column * transposed_stride + first;
      operand.a_row = transposed_stride;
      product<Scalar>(&operand, 1, target, M, columns.first, columns.last, NoFinish());
    } else {
      operand.a = dz + first * dz_stride + column;
      operand.a_k = dz_stride;
      product<Scalar, true>(&operand, 1, target, M, columns.first, columns.last, NoFinish());
    }
  }

  // Computes grad_input for up to kTaskRows rows of a run, starting at row i of the run.
  void write_input_rows(const Backward<Storage>& args, const Run& run, int64_t i,
                        const Scalar* rows_dz, int64_t stride, int64_t worker) const {
    const SequenceLayout& layout = args.layer.layout;
    const int64_t rows = min64(kTaskRows, run.rows - i);
    const auto grad = [&](int64_t r) {
      return run.along_time ? row_at(args.grad_input, layout, run.t + i + r, run.b)
                            : row_at(args.grad_input, layout, run.t, run.b + i + r);
    };
    if (args.layer.sums_given) {  // their gradients are dz
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t s = 0; s < cell->gates; ++s) {
          const Scalar* from = rows_dz + r * stride + s * H;
          Storage* to = grad(r) + cell->input_block[s] * H;
          args.accumulate_input ? add(from, to, H) : convert(from, to, H);
        }
      }
      return;
    }
    const int64_t K = cell->gates * H;
    const Operand<Scalar> operand{
        rows_dz, stride, weight_ih, K * w, K, kChain, prefetch ? weight_ih : nullptr};
    if constexpr (std::is_same_v<Storage, Scalar>) {
      if (!staged) {
        const Target<Scalar> target{grad(0), run_stride(args.grad_input, run), nullptr, 0,
                                    args.accumulate_input};
        product<Scalar>(&operand, 1, target, rows, 0, D, NoFinish());
        return;
      }
    }
    Scalar* copy = staged + worker * kTaskRows * D;
    const Target<Scalar> target{copy, D, nullptr, 0, args.accumulate_input};
    for (int64_t r = 0; args.accumulate_input && r < rows; ++r) convert(grad(r), copy + r * D, D);
    product<Scalar>(&operand, 1, target, rows, 0, D, NoFinish());
    for (int64_t r = 0; r < rows; ++r) convert(copy + r * D, grad(r), D);
  }
};

}  // namespace
}  // namespace namernn_fast
