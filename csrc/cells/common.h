// Builds a `Cell` for this instruction set from the struct in a cell's file. The passes use only
// the Cell. The struct has these members:
// - kind: its CellKind;
// - lists(): returns a Cell with all sizes and flags, but without functions;
// - states_of(rows, at): computes the states of the units at position `at` in a StateRows. A cell
//   that states_need_rows has states_of_row(rows, r) instead, for row r of the range;
// - sum_gradients(rows, at): computes the gradients of the sums for the units at position `at`
//   in a GradientRows. A cell that gradients_need_rows has sum_gradients_of_row(rows, r) instead;
// - prepare_own(i, values): converts the cell's own parameter i for use by the two functions above.
#pragma once

#include "contract.h"
#include "kernel/math/half.h"
#include "kernel/math/nonlinearities.h"

namespace namernn_fast {
namespace {

// Returns a Cell with default values that fit most cells.
constexpr Cell usual_cell() {
  Cell cell{};
  for (int64_t sum = 0; sum < kMostGates; ++sum) cell.input_block[sum] = sum;
  for (int64_t& blocks : cell.own_blocks) blocks = 1;
  cell.states = 1;
  cell.activations = 1;
  cell.has_weight_hh = true;
  cell.only_through_sums = true;
  cell.one_bias_gradient = true;
  return cell;
}

// Base class of cells that have no parameters except weights and biases.
struct NothingOwned {
  template <class Scalar>
  static Vec<Scalar> prepare_own(int64_t, Vec<Scalar> values) {
    return values;
  }
};

// The position of one vector of hidden units within a row.
struct At {
  int64_t row;
  int64_t unit;
  int64_t lanes;
  int64_t sum;  // index of the first unit's first sum within the range
};

template <class Element>
inline Element* element(const EvenRows<Element>& rows, At at) {
  return rows.data + at.row * rows.stride + at.unit;
}

template <class Element>
using VecOf = Vec<Compute<std::remove_const_t<Element>>>;

// Load and store the units at position `at`. Loading from null rows returns zeros.
template <class Element>
inline VecOf<Element> load_at(const EvenRows<Element>& rows, At at) {
  return rows.data ? load_upto(element(rows, at), at.lanes) : VecOf<Element>{};
}
template <class Element>
inline void store_at(const EvenRows<Element>& rows, At at, VecOf<Element> values) {
  store_upto(element(rows, at), values, at.lanes);
}

// Returns the number that an input holds for the row at position `at`, in all lanes.
template <class Storage>
inline VecOf<Storage> load_number(const EvenRows<const Storage>& rows, At at) {
  if (!rows.data) return VecOf<Storage>{};
  const VecOf<Storage> first = load_upto(rows.data + at.row * rows.stride, 1);
  return VecOf<Storage>{} + first[0];
}
// Stores the number that a row's input holds.
template <class Storage>
inline void store_number(const EvenRows<Storage>& rows, int64_t row, Compute<Storage> number) {
  store_upto(rows.data + row * rows.stride, VecOf<Storage>{} + number, 1);
}
// Load block i of the cell's own parameter p, or add to the gradient of this block.
template <class Arguments>
inline auto load_own(const Arguments& rows, int64_t p, int64_t i, At at) {
  return load_upto(rows.own[p] + i * rows.own_stride + at.unit, at.lanes);
}
template <class Storage>
inline void add_own(const GradientRows<Storage>& rows, int64_t p, int64_t i, At at,
                    VecOf<Storage> grad) {
  auto* total = rows.grad_own[p] + i * rows.H + at.unit;
  store_upto(total, load_upto(total, at.lanes) + grad, at.lanes);
}

// Load or store, at position `at`, sum i, block i of the kept values, or the gradient of sum i.
template <class Storage>
inline VecOf<Storage> load_sum(const StateRows<Storage>& rows, int64_t i, At at) {
  return load_upto(rows.sums.data + at.sum + i * rows.sum_stride, at.lanes);
}
template <class Storage>
inline VecOf<Storage> load_kept(const GradientRows<Storage>& rows, int64_t i, At at) {
  return load_upto(element(rows.kept, at) + i * rows.H, at.lanes);
}
template <class Storage>
inline void keep(const StateRows<Storage>& rows, int64_t i, At at, VecOf<Storage> values) {
  store_upto(element(rows.kept, at) + i * rows.H, values, at.lanes);
}
template <class Storage>
inline void store_dz(const GradientRows<Storage>& rows, int64_t i, At at, VecOf<Storage> values) {
  store_upto(rows.dz.data + at.sum + i * rows.sum_stride, values, at.lanes);
}

// Returns the total gradient of h: the gradient from later steps plus the gradient of the output.
template <class Storage>
inline VecOf<Storage> load_gradient(const GradientRows<Storage>& rows, At at) {
  VecOf<Storage> grad = load_at(rows.grad[0], at);
  if (rows.grad_output.data) grad += load_at(rows.grad_output, at);
  return grad;
}

// Calls f(at) for each vector of units in a range. `stride` is the row stride of the sums.
template <class Scalar, class F>
inline void for_each_place(const Range& range, int64_t stride, F&& f) {
  for (int64_t r = 0; r < range.rows; ++r) {
    for_each_vector<Scalar>(range.units, [&](int64_t j, int64_t lanes) {
      f(At{range.row + r, range.unit + j, lanes, r * stride + j});
    });
  }
}

// Calls f(at) for each vector of units in row r of a range that has whole rows. `stride` is the row
// stride of the sums.
template <class Scalar, class F>
inline void for_each_place_in_row(const Range& range, int64_t stride, int64_t r, F&& f) {
  for_each_vector<Scalar>(range.units, [&](int64_t j, int64_t lanes) {
    f(At{range.row + r, j, lanes, r * stride + j});
  });
}
template <class Storage, class F>
inline void for_each_place_in_row(const StateRows<Storage>& rows, int64_t r, F&& f) {
  for_each_place_in_row<Compute<Storage>>(rows.range, rows.sums.stride, r, f);
}
template <class Storage, class F>
inline void for_each_place_in_row(const GradientRows<Storage>& rows, int64_t r, F&& f) {
  for_each_place_in_row<Compute<Storage>>(rows.range, rows.dz.stride, r, f);
}

// Returns the mean of f(at) over all units of row r.
template <class Arguments, class F>
inline typename Arguments::Scalar mean_of_row(const Arguments& rows, int64_t r, F&& f) {
  using Scalar = typename Arguments::Scalar;
  Vec<Scalar> sums{};
  for_each_place_in_row(rows, r, [&](At at) { sums += first_lanes<Scalar>(f(at), at.lanes); });
  Scalar sum = 0;
  for (int lane = 0; lane < Simd<Scalar>::lanes; ++lane) sum += sums[lane];
  return sum / Scalar(rows.range.units);
}

// __restrict promises that no store overwrites `rows`, so its members can stay in registers.
template <class TheCell, class Storage>
void states_of(const StateRows<Storage>& __restrict rows) {
  if constexpr (TheCell::lists().states_need_rows) {
    for (int64_t r = 0; r < rows.range.rows; ++r) TheCell::states_of_row(rows, r);
  } else {
    for_each_place<Compute<Storage>>(rows.range, rows.sums.stride,
                                     [&](At at) { TheCell::states_of(rows, at); });
  }
}
template <class TheCell, class Storage>
void sum_gradients(const GradientRows<Storage>& __restrict rows) {
  if constexpr (TheCell::lists().gradients_need_rows) {
    for (int64_t r = 0; r < rows.range.rows; ++r) TheCell::sum_gradients_of_row(rows, r);
  } else {
    for_each_place<Compute<Storage>>(rows.range, rows.dz.stride,
                                     [&](At at) { TheCell::sum_gradients(rows, at); });
  }
}

template <class TheCell, class Scalar>
void prepare_own(int64_t i, Scalar* own, int64_t n) {
  for_each_vector<Scalar>(n, [=](int64_t j, int64_t lanes) {
    store_upto(own + j, TheCell::template prepare_own<Scalar>(i, load_upto(own + j, lanes)), lanes);
  });
}

template <class TheCell>
struct CodeOf {
  template <class Storage>
  static constexpr CellCode<Storage> code() {
    return {&states_of<TheCell, Storage>, &sum_gradients<TheCell, Storage>,
            &prepare_own<TheCell, Compute<Storage>>};
  }
};

// Returns the cell with the functions of Code for this instruction set.
template <class Code>
constexpr Cell with_code(Cell cell) {
  static_cast<CellCode<float>&>(cell) = Code::template code<float>();
  static_cast<CellCode<double>&>(cell) = Code::template code<double>();
  static_cast<CellCode<BFloat16>&>(cell) = Code::template code<BFloat16>();
  static_cast<CellCode<Half>&>(cell) = Code::template code<Half>();
  return cell;
}

}  // namespace
}  // namespace namernn_fast
