// Runs the programs of cells that users write as equations (see program.h). Each instruction
// computes a chunk, some units of some rows, before the next instruction starts, so that the cost
// of choosing an instruction is shared and registers stay in the L1 cache.
#pragma once

#include <array>

#include "cells/common.h"
#include "program.h"

namespace namernn_fast {
namespace {

// The elements of a value in a chunk: unit j of row r is at data[r * stride + (j & mask)]. mask is
// 0 if the units have the same value, which then fills a vector; otherwise all its bits are set.
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
    case Operation::accumulate:  // b is the destination
      return a + b;
    case Operation::sub:
      return a - b;
    case Operation::mul:
      return a * b;
    case Operation::div:
      return a / b;
    case Operation::min:
      return ((a < b) | (a != a)) ? a : b;
    case Operation::max:
      return ((a > b) | (a != a)) ? a : b;
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
    case Operation::mean:
      break;  // see add_to_mean()
  }
  return a;
}

template <class Scalar>
using Apply = void (*)(const ChunkValue<Scalar>& to, const ChunkValue<Scalar>& a,
                       const ChunkValue<Scalar>& b, const ChunkValue<Scalar>& c, int64_t rows,
                       int64_t units);

// Computes an operation for a chunk.
template <class Scalar, int kIndex>
void apply(const ChunkValue<Scalar>& to, const ChunkValue<Scalar>& a, const ChunkValue<Scalar>& b,
           const ChunkValue<Scalar>& c, int64_t rows, int64_t units) {
  constexpr Operation operation = Operation(kIndex);
  constexpr int sources = operation == Operation::accumulate ? 2 : kOperations[kIndex].sources;
  const int64_t a_mask = a.mask, b_mask = b.mask, c_mask = c.mask;
  for (int64_t r = 0; r < rows; ++r) {
    Scalar* const to_row = to.data + r * to.stride;
    const Scalar* const a_row = a.data + r * a.stride;
    const Scalar* const b_row = sources > 1 ? b.data + r * b.stride : nullptr;
    const Scalar* const c_row = sources > 2 ? c.data + r * c.stride : nullptr;
    for_each_vector<Scalar>(units, [=](int64_t j, int64_t n) {
      const Vec<Scalar> a_values = load_upto(a_row + (j & a_mask), n);
      Vec<Scalar> b_values{}, c_values{};
      if (sources > 1) b_values = load_upto(b_row + (j & b_mask), n);
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
  static constexpr int64_t lanes = Simd<Scalar>::lanes;
  // Maximum number of elements of a chunk.
  static constexpr int64_t kChunk = 1024 / int64_t(sizeof(Scalar));

  const Arguments& args;
  const PassProgram& pass;
  const double* constants;
  Value* values;   // [slot_count]
  Scalar* memory;  // [slot_count, kChunk]

  // The chunk that is being computed: units j .. j + units of rows r .. r + rows of the range.
  int64_t r = 0, j = 0, rows = 0, units = 0;
  int64_t bound_units = -1;  // the number of units for which registers are bound

  static int64_t padded(int64_t units) { return units + (-units & (lanes - 1)); }

  // Returns where slot s is if it has no place in a tensor. Values that are live across phases need
  // memory for a whole row if a row has several chunks.
  Value private_value(int64_t s) const {
    const Slot& slot = pass.slots[s];
    const int64_t H = args.range.units;
    if (slot.row_register >= 0 && H > kChunk) {
      return {args.row_registers + slot.row_register * padded(H) + j, 0, -1};
    }
    Scalar* const data = memory + s * kChunk;
    if (slot.is_number) return {data, lanes, 0};
    return {data, slot.is_vector ? 0 : padded(units), -1};
  }

  // Returns where the chunk is in `view`.
  template <class Element>
  Value in_place(const EvenRows<Element>& view) const {
    auto* const data = const_cast<std::remove_const_t<Element>*>(view.data) +
                       (args.range.row + r) * view.stride + args.range.unit + j;
    return {data, view.stride, -1};
  }

  // Calls f(elements of slot s, elements of `view`, count) for each row of the chunk.
  template <class Element, class F>
  void for_each_row(int64_t s, const EvenRows<Element>& view, F&& f) const {
    const bool is_number = pass.slots[s].is_number;
    Element* data = view.data + (args.range.row + r) * view.stride;
    if (!is_number) data += args.range.unit + j;
    for (int64_t n = 0; n < rows; ++n) {
      f(values[s].data + n * values[s].stride, data + n * view.stride, is_number ? 1 : units);
    }
  }

  // Makes slot s hold the elements of `view`, or zeros if `view` is null. Reads in place if
  // possible.
  template <class Element>
  void read(int64_t s, const EvenRows<const Element>& view) const {
    if (!view.data) {
      values[s] = {memory + s * kChunk, 0, 0};
      store(values[s].data, Vec<Scalar>{});
    } else if (pass.slots[s].is_number) {
      values[s] = private_value(s);
      for_each_row(s, view, [](Scalar* to, const Element* from, int64_t) {
        store(to, Vec<Scalar>{} + load_upto(from, 1)[0]);
      });
    } else if constexpr (std::is_same_v<Element, Scalar>) {
      values[s] = in_place(view);
    } else {
      values[s] = private_value(s);
      for_each_row(s, view,
                   [](Scalar* to, const Element* from, int64_t n) { convert(from, to, n); });
    }
  }

  // Makes slot s the place of a result: in `view` if possible, otherwise in private memory.
  template <class Element>
  void place(int64_t s, const EvenRows<Element>& view) const {
    values[s] = private_value(s);
    if constexpr (std::is_same_v<Element, Scalar>) {
      if (view.data && !pass.slots[s].is_number) values[s] = in_place(view);
    }
  }

  // Writes slot s to `view`, unless it is there already or `view` is null.
  template <class Element>
  void write(int64_t s, const EvenRows<Element>& view) const {
    if (!view.data) return;
    if constexpr (std::is_same_v<Element, Scalar>) {
      if (!pass.slots[s].is_number && values[s].data == in_place(view).data) return;
    }
    for_each_row(s, view, [](const Scalar* from, Element* to, int64_t n) { convert(from, to, n); });
  }

  // Returns block i of each row of `view`. A block has H elements.
  template <class Element>
  EvenRows<Element> block_of(EvenRows<Element> view, int64_t i) const {
    if (view.data) view.data += i * args.H;
    return view;
  }

  // Returns where the i-th sums, or their gradients, are.
  template <class Element>
  Value sums_in(const EvenRows<Element>& sums, int64_t i) const {
    return {const_cast<Scalar*>(sums.data) + r * sums.stride + i * args.sum_stride + j, sums.stride,
            -1};
  }

  // Makes slot s refer to its place in memory. Reads its value if it has one.
  void bind(int64_t s) const {
    const Slot& slot = pass.slots[s];
    const int64_t i = slot.index;
    switch (slot.place) {
      case Place::own: {
        Scalar* const own = const_cast<Scalar*>(args.own[slot.parameter]) + i * args.own_stride;
        values[s] = {own + args.range.unit + j, 0, -1};
        return;
      }
      case Place::previous:
        return read(s, args.previous[i]);
      case Place::input:
        return read(s, args.inputs[i]);
      default:
        break;
    }
    if constexpr (is_forward) {
      if (slot.place == Place::sum) values[s] = sums_in(args.sums, i);
      if (slot.place == Place::state) values[s] = in_place(args.states[i]);
      if (slot.place == Place::kept) place(s, block_of(args.kept, i));
    } else {
      if (slot.place == Place::output) read(s, args.output);
      if (slot.place == Place::kept) read(s, block_of(args.kept, i));
      if (slot.place == Place::grad) read_gradient(s, i);
      if (slot.place == Place::dz) values[s] = sums_in(args.dz, i);
      if (slot.place == Place::grad_previous) values[s] = in_place(args.grad_previous[i]);
      if (slot.place == Place::grad_input) place(s, args.grad_inputs[i]);
      if (slot.place == Place::grad_own) {
        values[s] = {args.grad_own[slot.parameter] + i * args.H + args.range.unit + j, 0, -1};
      }
    }
    if (slot.place <= Place::vector) values[s] = private_value(s);  // live across phases
  }

  // Makes slot s the total gradient of the i-th new state.
  void read_gradient(int64_t s, int64_t i) const {
    if constexpr (!is_forward) {
      values[s] = in_place(args.grad[i]);
      if (i > 0 || !args.grad_output.data) return;
      const Value later = values[s];
      values[s] = private_value(s);
      const Scalar* grad = later.data;
      for_each_row(s, args.grad_output, [&](Scalar* to, const Storage* from, int64_t count) {
        for_each_vector<Scalar>(count, [=](int64_t at, int64_t n) {
          store_upto(to + at, load_upto(grad + at, n) + load_upto(from + at, n), n);
        });
        grad += later.stride;
      });
    }
  }

  // Writes what slot s holds to the tensors, after the instructions of a phase.
  void deliver(int64_t s) const {
    const Slot& slot = pass.slots[s];
    if constexpr (is_forward) {
      if (slot.place == Place::kept) write(s, block_of(args.kept, slot.index));
      // The last blocks of the kept values are the cell states.
      if (slot.place == Place::state && slot.index > 0) {
        write(s, block_of(args.kept, pass.first_kept_state + slot.index));
      }
    } else {
      if (slot.place == Place::grad_input) write(s, args.grad_inputs[slot.index]);
    }
  }

  // Adds the elements of a chunk to each row's vector of sums, from which finish_means() computes
  // the mean.
  void add_to_mean(const Instruction& instruction, bool is_first) const {
    const Value& source = values[instruction.sources[0]];
    for (int64_t n = 0; n < rows; ++n) {
      Scalar* const total = values[instruction.destination].data + n * lanes;
      Vec<Scalar> sums = is_first ? Vec<Scalar>{} : load(total);
      for_each_vector<Scalar>(units, [&](int64_t i, int64_t count) {
        sums += load_upto(source.data + n * source.stride + (i & source.mask), count);
      });
      store(total, sums);
    }
  }
  void finish_means(const Phase& phase) const {
    for (int64_t i = phase.first; i < phase.last; ++i) {
      const Instruction& instruction = pass.instructions[i];
      if (instruction.operation != Operation::mean) continue;
      for (int64_t n = 0; n < rows; ++n) {
        Scalar* const total = values[instruction.destination].data + n * lanes;
        Scalar sum = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) sum += total[lane];
        store(total, Vec<Scalar>{} + sum / Scalar(args.range.units));
      }
    }
  }

  // Makes the slots of registers and constants refer to their memory, whose strides depend on the
  // number of units.
  void bind_registers() {
    if (std::exchange(bound_units, units) == units) return;
    for (int64_t s = 0; s < pass.slot_count; ++s) {
      const Slot& slot = pass.slots[s];
      if (slot.place == Place::constant || slot.place == Place::units) {
        values[s] = {memory + s * kChunk, 0, 0};
        const Scalar value =
            slot.place == Place::units ? Scalar(args.H) : Scalar(constants[slot.index]);
        store(values[s].data, Vec<Scalar>{} + value);
      } else if (slot.place <= Place::vector) {
        values[s] = private_value(s);
      }
    }
  }

  // Runs a phase on the chunk. `is_first` tells whether it is the first chunk of its rows.
  void run(const Phase& phase, bool is_first) {
    bind_registers();
    for (int64_t n = 0; n < phase.slot_count; ++n) bind(phase.slots[n]);
    for (int64_t n = phase.first; n < phase.last; ++n) {
      const Instruction& instruction = pass.instructions[n];
      if (instruction.operation == Operation::mean) {
        add_to_mean(instruction, is_first);
        continue;
      }
      if (instruction.of_numbers && !is_first) continue;
      if constexpr (is_forward) {
        if (instruction.only_kept && !args.kept.data) continue;
      }
      const auto& [a, b, c] = instruction.sources;
      kApply<Scalar>[size_t(instruction.operation)](
          values[instruction.destination], values[a], values[b], values[c],
          instruction.of_vectors ? 1 : rows, instruction.of_numbers ? lanes : units);
    }
    for (int64_t n = 0; n < phase.slot_count; ++n) deliver(phase.slots[n]);
  }

  void run_all() {
    const Range& range = args.range;
    const int64_t width = min64(range.units, kChunk);
    for (r = 0; r < range.rows; r += rows) {
      rows = range.units > kChunk ? 1 : min64(range.rows - r, kChunk / padded(width));
      for (int64_t p = 0; p < pass.phase_count; ++p) {
        for (j = 0; j < range.units; j += units) {
          units = min64(width, range.units - j);
          run(pass.phases[p], j == 0);
        }
        if (pass.phase_count > 1) finish_means(pass.phases[p]);
      }
    }
  }
};

template <class Arguments, class Storage>
inline void run_program(const Arguments& args, const Program& program, const PassProgram& pass) {
  using Runs = Interpreter<Arguments, Storage>;
  using Scalar = Compute<Storage>;
  const size_t slots = size_t(pass.slot_count);
  auto* const values =
      static_cast<ChunkValue<Scalar>*>(__builtin_alloca(slots * sizeof(ChunkValue<Scalar>)));
  auto* const memory =
      static_cast<Scalar*>(__builtin_alloca_with_align(slots * Runs::kChunk * sizeof(Scalar), 512));
  Runs{args, pass, program.constants, values, memory}.run_all();
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
};

}  // namespace
}  // namespace namernn_fast
