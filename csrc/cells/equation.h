// Runs the programs of cells that users write as equations (see program.h). Each instruction
// computes a chunk, some segments of some units, before the next instruction starts, so that the
// cost of choosing an instruction is shared and registers stay in the L1 cache. The segments of a
// chunk are rows or, if the cell computes means, unit blocks of a row.
#pragma once

#include <array>

#include "cells/common.h"
#include "program.h"

namespace namernn_fast {
namespace {

// The elements of a value in a chunk: unit j of segment s is at data[s * stride + (j & mask)]. mask
// is 0 if the units have the same value, which then fills a vector; otherwise all its bits are set.
template <class Scalar>
struct ChunkValue {
  Scalar* data;
  int64_t stride;
  int64_t mask;
};

// Computes an operation for one vector.
template <class Scalar, Operation kOperation>
inline Vec<Scalar> compute(Vec<Scalar> a, Vec<Scalar> b, Vec<Scalar> c) {
  using V = Vec<Scalar>;
  constexpr Scalar one = Scalar(1);
  const auto as_number = [](auto condition) { return condition ? V{} + Scalar(1) : V{}; };
  switch (kOperation) {
    case Operation::copy:
      return a;
    case Operation::neg:
      return -a;
    case Operation::abs:
      return (V)((typename Simd<Scalar>::I)a & ~sign_bit<Scalar>());
    case Operation::sign:
      return as_number(a > V{}) - as_number(a < V{});
    case Operation::sqrt:
      return sqrt<Scalar>(a);
    case Operation::rsqrt:
      return one / sqrt<Scalar>(a);
    case Operation::recip:
      return one / a;
    case Operation::exp:
      return exp<Scalar>(a);
    case Operation::log:
      return log<Scalar>(a);
    case Operation::log1p:
      return log1p<Scalar>(a);
    case Operation::expm1:
      return expm1<Scalar>(a);
    case Operation::tanh:
      return tanh<Scalar>(a);
    case Operation::sigmoid:
      return sigmoid<Scalar>(a);
    case Operation::softplus:
      return softplus<Scalar>(a);
    case Operation::add:
      return a + b;
    case Operation::sub:
      return a - b;
    case Operation::mul:
      return a * b;
    case Operation::div:
      return a / b;
    case Operation::min:
      return (a < b) | (a != a) ? a : b;
    case Operation::max:
      return (a > b) | (a != a) ? a : b;
    case Operation::lt:
      return as_number(a < b);
    case Operation::le:
      return as_number(a <= b);
    case Operation::eq:
      return as_number(a == b);
    case Operation::where:
      return a != V{} ? b : c;
    case Operation::fma:
      return a * b + c;
    case Operation::fnma:
      return c - a * b;
    case Operation::tanh_grad:
      return a * (one - b * b);
    case Operation::sigmoid_grad:
      return a * (b * (one - b));
    case Operation::accumulate:
      return a + c;
    case Operation::mean:
      break;  // see add_to_mean()
  }
  return a;
}

template <class Scalar>
using Apply = void (*)(const ChunkValue<Scalar>& to, const ChunkValue<Scalar>& a,
                       const ChunkValue<Scalar>& b, const ChunkValue<Scalar>& c, int64_t segments,
                       int64_t units);

// Computes an operation for a chunk.
template <class Scalar, int kIndex>
void apply(const ChunkValue<Scalar>& to, const ChunkValue<Scalar>& a, const ChunkValue<Scalar>& b,
           const ChunkValue<Scalar>& c, int64_t segments, int64_t units) {
  constexpr Operation operation = Operation(kIndex);
  constexpr int sources = operation == Operation::accumulate ? 3 : kOperations[kIndex].sources;
  constexpr bool reads_b = sources > 1 && operation != Operation::accumulate;
  const int64_t a_mask = a.mask, b_mask = b.mask, c_mask = c.mask;
  for (int64_t s = 0; s < segments; ++s) {
    Scalar* const to_row = to.data + s * to.stride;
    const Scalar* const a_row = a.data + s * a.stride;
    const Scalar* const b_row = reads_b ? b.data + s * b.stride : nullptr;
    const Scalar* const c_row = sources > 2 ? c.data + s * c.stride : nullptr;
    for_each_vector<Scalar>(units, [=](int64_t j, int64_t n) {
      const Vec<Scalar> a_values = load_upto(a_row + (j & a_mask), n);
      Vec<Scalar> b_values{}, c_values{};
      if (reads_b) b_values = load_upto(b_row + (j & b_mask), n);
      if (sources > 2) c_values = load_upto(c_row + (j & c_mask), n);
      store_upto(to_row + j, compute<Scalar, operation>(a_values, b_values, c_values), n);
    });
  }
}

template <class Scalar, size_t... kIndices>
constexpr std::array<Apply<Scalar>, sizeof...(kIndices)> all_operations(
    std::index_sequence<kIndices...>) {
  return {&apply<Scalar, int(kIndices)>...};
}
template <class Scalar>
constexpr auto kApply = all_operations<Scalar>(std::make_index_sequence<kOperationCount>());

// Runs one pass of a program on the rows of Arguments, which are StateRows or GradientRows.
template <class Arguments, class Storage>
struct Interpreter {
  using Scalar = Compute<Storage>;
  using Value = ChunkValue<Scalar>;
  static constexpr bool is_forward = std::is_same_v<Arguments, StateRows<Storage>>;
  static constexpr bool is_stored_as_computed = std::is_same_v<Storage, Scalar>;
  static constexpr int64_t lanes = Simd<Scalar>::lanes;
  // Maximum number of elements of a chunk.
  static constexpr int64_t kChunk = 1024 / int64_t(sizeof(Scalar));

  const Arguments& rows;
  const PassProgram& pass;
  const double* constants;
  Value* values;   // [slot_count]
  Scalar* memory;  // [slot_count, kChunk]

  // The part of the rows that is being computed: units j .. j + segments * units of row r or, if
  // segments are rows, units j .. j + units of rows r .. r + segments.
  int64_t r, j, segments, units;
  int64_t bound_units;

  Value private_value(int64_t s) const {
    const Slot& slot = pass.slots[s];
    if (slot.row_register >= 0) {
      const int64_t H = rows.range.units + (-rows.range.units & (lanes - 1));
      return {rows.row_registers + slot.row_register * H + j, units, -1};
    }
    Scalar* const data = memory + s * kChunk;
    if (slot.is_number) return {data, pass.needs_rows ? 0 : lanes, 0};
    if (pass.needs_rows) return {data, units, -1};
    return {data, slot.is_vector ? 0 : units + (-units & (lanes - 1)), -1};
  }

  // Returns the value at row r and unit j of `view`, in place.
  template <class Element>
  Value in_place(const EvenRows<Element>& view) const {
    auto* const data = const_cast<std::remove_const_t<Element>*>(view.data) +
                       (rows.range.row + r) * view.stride + rows.range.unit + j;
    return {data, pass.needs_rows ? units : view.stride, -1};
  }

  // Calls f(data, elements of the tensor, count) for each segment of slot s, whose rows are at
  // `view`.
  template <class Element, class F>
  void for_each_segment(int64_t s, const EvenRows<Element>& view, F&& f) const {
    const bool is_number = pass.slots[s].is_number;
    Element* data = view.data + (rows.range.row + r) * view.stride;
    if (!is_number) data += rows.range.unit + j;
    const int64_t stride = !pass.needs_rows ? view.stride : is_number ? 0 : units;
    const int64_t count = is_number && pass.needs_rows ? 1 : segments;
    for (int64_t n = 0; n < count; ++n) {
      f(values[s].data + n * values[s].stride, data + n * stride, is_number ? 1 : units);
    }
  }

  // Makes slot s a copy of `view`, converted to Scalar, or zeros if `view` is null. Reads in place
  // if possible.
  template <class Element>
  void read(int64_t s, const EvenRows<const Element>& view) const {
    if (!view.data) {
      values[s] = {memory + s * kChunk, 0, 0};
      store(values[s].data, Vec<Scalar>{});
    } else if (pass.slots[s].is_number) {
      values[s] = private_value(s);
      for_each_segment(s, view, [](Scalar* to, const Element* from, int64_t) {
        store(to, Vec<Scalar>{} + load_upto(from, 1)[0]);
      });
    } else if constexpr (std::is_same_v<Element, Scalar>) {
      values[s] = in_place(view);
    } else {
      values[s] = private_value(s);
      for_each_segment(s, view,
                       [](Scalar* to, const Element* from, int64_t n) { convert(from, to, n); });
    }
  }

  // Makes slot s the place of a result: in `view` if possible, otherwise in private memory.
  template <class Element>
  void place(int64_t s, const EvenRows<Element>& view) const {
    if constexpr (std::is_same_v<Element, Scalar>) {
      if (view.data && !pass.slots[s].is_number) {
        values[s] = in_place(view);
        return;
      }
    }
    values[s] = private_value(s);
  }

  // Writes slot s to `view`, unless it is there already or `view` is null.
  template <class Element>
  void write(int64_t s, const EvenRows<Element>& view) const {
    if (!view.data) return;
    if constexpr (std::is_same_v<Element, Scalar>) {
      if (!pass.slots[s].is_number && values[s].data == in_place(view).data) return;
    }
    for_each_segment(s, view,
                     [](const Scalar* from, Element* to, int64_t n) { convert(from, to, n); });
  }
  template <class Element>
  static EvenRows<Element> block_of(EvenRows<Element> view, int64_t offset) {
    if (view.data) view.data += offset;
    return view;
  }

  // Returns where the sums, or their gradients, of slot s are in the chunk.
  template <class Element>
  Value sums_in(const EvenRows<Element>& sums, int64_t index) const {
    Scalar* data = const_cast<Scalar*>(sums.data) + r * sums.stride + index * rows.sum_stride;
    if (!pass.needs_rows) return {data + j, sums.stride, -1};
    if constexpr (is_forward) {
      return {data + j / rows.block_units * rows.block_stride, rows.block_stride, -1};
    }
    return {data + j, units, -1};
  }

  // Makes slot s refer to its place in memory outside registers. Reads its value if it has one.
  void bind(int64_t s) const {
    const Slot& slot = pass.slots[s];
    const int64_t i = slot.index;
    if (slot.place == Place::own) {
      Scalar* const block = const_cast<Scalar*>(rows.own[slot.parameter]) + i * rows.own_stride;
      values[s] = {block + rows.range.unit + j, pass.needs_rows ? units : 0, -1};
      return;
    }
    if (slot.place == Place::previous) return read(s, rows.previous[i]);
    if (slot.place == Place::input) return read(s, rows.inputs[i]);
    if constexpr (is_forward) {
      if (slot.place == Place::sum) values[s] = sums_in(rows.sums, i);
      if (slot.place == Place::state) values[s] = in_place(rows.states[i]);
      if (slot.place == Place::kept) place(s, block_of(rows.kept, i * rows.H));
    } else {
      if (slot.place == Place::output) read(s, rows.output);
      if (slot.place == Place::kept) read(s, block_of(rows.kept, i * rows.H));
      if (slot.place == Place::grad) read_gradient(s, i);
      if (slot.place == Place::dz) values[s] = sums_in(rows.dz, i);
      if (slot.place == Place::grad_previous) values[s] = in_place(rows.grad_previous[i]);
      if (slot.place == Place::grad_input) place(s, rows.grad_inputs[i]);
      if (slot.place == Place::grad_own) {
        Scalar* const total = rows.grad_own[slot.parameter] + i * rows.H + rows.range.unit + j;
        values[s] = {total, pass.needs_rows ? units : 0, -1};
      }
    }
    if (slot.place <= Place::vector) values[s] = private_value(s);  // in memory for a whole row
  }

  // Makes slot s the total gradient of the i-th new state.
  void read_gradient(int64_t s, int64_t i) const {
    if constexpr (!is_forward) {
      values[s] = in_place(rows.grad[i]);
      if (i > 0 || !rows.grad_output.data) return;
      const Value later = values[s];
      values[s] = private_value(s);
      int64_t n = 0;
      for_each_segment(s, rows.grad_output, [&](Scalar* to, const Storage* from, int64_t count) {
        const Scalar* const grad = later.data + n++ * later.stride;
        for_each_vector<Scalar>(count, [=](int64_t at, int64_t width) {
          store_upto(to + at, load_upto(grad + at, width) + load_upto(from + at, width), width);
        });
      });
    }
  }

  // Writes what slot s holds to the tensors, after the instructions of a phase.
  void deliver(int64_t s) const {
    const Slot& slot = pass.slots[s];
    if constexpr (is_forward) {
      if (slot.place == Place::kept) write(s, block_of(rows.kept, slot.index * rows.H));
      // The last blocks of the kept values are the cell states.
      if (slot.place == Place::state && slot.index > 0) {
        write(s, block_of(rows.kept, (pass.first_kept_state + slot.index) * rows.H));
      }
    } else {
      if (slot.place == Place::grad_input) write(s, rows.grad_inputs[slot.index]);
    }
  }

  // Adds the elements of a chunk to the vector of sums of a mean.
  void add_to_mean(const Instruction& instruction, bool is_first) const {
    Scalar* const total = values[instruction.destination].data;
    const Value& source = values[instruction.sources[0]];
    Vec<Scalar> sums = is_first ? Vec<Scalar>{} : load(total);
    for (int64_t s = 0; s < segments; ++s) {
      for_each_vector<Scalar>(units, [&](int64_t i, int64_t n) {
        const Scalar* const from = source.data + s * source.stride + (i & source.mask);
        sums += n == lanes ? load(from) : load_first(from, n);
      });
    }
    store(total, sums);
  }

  // Runs a phase on the chunk.
  void run(const Phase& phase, bool is_first) const {
    for (int64_t n = 0; n < phase.slot_count; ++n) bind(phase.slots[n]);
    for (int64_t n = phase.first; n < phase.last; ++n) {
      const Instruction& instruction = pass.instructions[n];
      if (instruction.operation == Operation::mean) {
        add_to_mean(instruction, is_first);
        continue;
      }
      if constexpr (is_forward) {
        if (instruction.only_kept && !rows.kept.data) continue;
      }
      int64_t count = segments, width = units;
      if (instruction.of_numbers) {
        if (pass.needs_rows && !is_first) continue;
        if (pass.needs_rows) count = 1;
        width = lanes;
      }
      if (instruction.of_vectors && !pass.needs_rows) count = 1;
      const auto& [a, b, c] = instruction.sources;
      kApply<Scalar>[size_t(instruction.operation)](values[instruction.destination], values[a],
                                                    values[b], values[c], count, width);
    }
    for (int64_t n = 0; n < phase.slot_count; ++n) deliver(phase.slots[n]);
  }

  // Turns the sums of the means of a phase into means.
  void finish_means(const Phase& phase) const {
    for (int64_t n = phase.first; n < phase.last; ++n) {
      const Instruction& instruction = pass.instructions[n];
      if (instruction.operation != Operation::mean) continue;
      Scalar* const total = values[instruction.destination].data;
      Scalar sum = 0;
      for (int64_t lane = 0; lane < lanes; ++lane) sum += total[lane];
      store(total, Vec<Scalar>{} + sum / Scalar(rows.range.units));
    }
  }

  // Makes the slots of registers and constants refer to their memory, whose strides depend on the
  // number of units of a segment.
  void bind_registers() {
    if (std::exchange(bound_units, units) == units) return;
    for (int64_t s = 0; s < pass.slot_count; ++s) {
      const Slot& slot = pass.slots[s];
      if (slot.place == Place::constant || slot.place == Place::units) {
        values[s] = {memory + s * kChunk, 0, 0};
        const Scalar value =
            slot.place == Place::units ? Scalar(rows.H) : Scalar(constants[slot.index]);
        store(values[s].data, Vec<Scalar>{} + value);
      } else if (slot.place <= Place::vector && slot.row_register < 0) {
        values[s] = private_value(s);
      }
    }
  }

  void run_all() {
    const Range& range = rows.range;
    if (pass.needs_rows) return run_rows();
    j = 0;
    for (r = 0; r < range.rows; r += segments) {
      if (range.units > kChunk) {
        segments = 1;
        for (j = 0; j < range.units; j += units) {
          units = min64(kChunk, range.units - j);
          bind_registers();
          run(pass.phases[0], true);
        }
        continue;
      }
      units = range.units;
      segments = min64(range.rows - r, kChunk / (units + (-units & (lanes - 1))));
      bind_registers();
      run(pass.phases[0], true);
    }
  }

  void run_rows() {
    const Range& range = rows.range;
    int64_t block = kChunk;  // units of a segment
    if constexpr (is_forward) block = rows.block_units;
    for (r = 0; r < range.rows; ++r) {
      for (int64_t p = 0; p < pass.phase_count; ++p) {
        for (j = 0; j < range.units; j += segments * units) {
          units = min64(block, range.units - j);
          segments = is_forward ? max64(1, min64(kChunk / block, (range.units - j) / block)) : 1;
          bind_registers();
          run(pass.phases[p], j == 0);
        }
        finish_means(pass.phases[p]);
      }
    }
  }
};

template <class Arguments, class Storage>
inline void run_program(const Arguments& rows, const Program& program, const PassProgram& pass) {
  using Runs = Interpreter<Arguments, Storage>;
  using Scalar = Compute<Storage>;
  const size_t slots = size_t(pass.slot_count);
  auto* const values =
      static_cast<ChunkValue<Scalar>*>(__builtin_alloca(slots * sizeof(ChunkValue<Scalar>)));
  auto* const memory =
      static_cast<Scalar*>(__builtin_alloca_with_align(slots * Runs::kChunk * sizeof(Scalar), 512));
  Runs{rows, pass, program.constants, values, memory, 0, 0, 0, 0, -1}.run_all();
}

// The cell of equations. A program replaces its lists.
struct Equation {
  template <class Storage>
  static void states_of(const StateRows<Storage>& rows) {
    run_program<StateRows<Storage>, Storage>(rows, *rows.program, rows.program->forward);
  }
  template <class Storage>
  static void sum_gradients(const GradientRows<Storage>& rows) {
    run_program<GradientRows<Storage>, Storage>(rows, *rows.program, rows.program->backward);
  }
  template <class Scalar>
  static void prepare_own(int64_t, Scalar*, int64_t) {}

  template <class Storage>
  static constexpr CellCode<Storage> code() {
    return {&states_of<Storage>, &sum_gradients<Storage>, &prepare_own<Compute<Storage>>};
  }
  static constexpr Cell cell() {
    Cell cell{};
    static_cast<CellCode<float>&>(cell) = code<float>();
    static_cast<CellCode<double>&>(cell) = code<double>();
    static_cast<CellCode<BFloat16>&>(cell) = code<BFloat16>();
    static_cast<CellCode<Half>&>(cell) = code<Half>();
    return cell;
  }
};

}  // namespace
}  // namespace namernn_fast
