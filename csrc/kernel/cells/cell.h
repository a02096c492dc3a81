// What a cell is: a type that the passes take as a template parameter. They use nothing but its
// members; register tiles and products do not depend on the cell. Each pass asserts what it assumes
// about the constants, so a cell with other values does not compile until that pass supports it.
// A cell has these members:
// - kind, name: its CellKind, and its name in messages;
// - weight_blocks: number of blocks of H rows in weight_ih and in weight_hh, one per gate;
// - sums: number of blocks of H sums (values before the activation) in each row. The input
//   contributes to the first weight_blocks of them, the previous state to weight_blocks of them
//   from first_state_sum on;
// - input_block(sum): the block of weight_ih that contributes to a sum. Blocks of weight_hh
//   contribute to the sums of the state in order;
// - sums_in_output: whether the sums of a row are stored in its row of the output until its states
//   replace them;
// - kept: number of blocks of H values that a row keeps for the backward pass besides its output;
// - states: number of states of a row: 1, or 2 with a cell state, which the next step reads without
//   a product. The cell state is the last block of the kept values;
// - only_through_sums: whether the states depend on the previous h through sums alone. If not,
//   sum_gradients() also writes the rest of the gradient of the previous h;
// - one_bias_gradient: whether bias_ih and bias_hh have the same gradient, the sum of all dz;
// - has_nonlinearity: whether `Layer::activation` chooses the nonlinearity; if not, it is tanh;
// - Cell(layer): reads what it needs of a Layer;
// - states_of(row): computes the states of a StateRow;
// - sum_gradients(row): computes the gradients of the sums of a GradientRow.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

// Some hidden units of a row: what states_of() reads and writes. Pointers are to the first of these
// units, and null for what the cell lacks.
template <class Scalar, class Storage>
struct StateRow {
  const Scalar* sums;  // the blocks are `stride` apart
  int64_t stride;
  const Scalar* previous[kMostStates];  // states of the previous step; null: zeros
  Scalar* states[kMostStates];          // written; may be `previous`, and [0] may be `sums`
  Storage* kept;                        // written, unless null; the blocks are H apart
  int64_t H;
  int64_t width;  // number of units
};

// Some hidden units of a row: what sum_gradients() reads and writes.
template <class Storage, class Scalar, class Element>
struct GradientRow {
  const Storage* output;
  const Storage* kept;                   // the blocks are H apart
  const Storage* previous[kMostStates];  // states of the previous step; null: zeros, or h that is
                                         // not read because the cell is only_through_sums
  const Scalar* grad[kMostStates];       // of the states, without grad_output
  const Storage* grad_output;            // null: zeros
  Element* dz;                           // written; the blocks are `stride` apart
  int64_t stride;
  Scalar* grad_previous[kMostStates];  // written: what reaches a previous state through no sum; may
                                       // be `grad`
  int64_t H;
  int64_t width;
};

// Loads the state of some lanes; a null state is zeros.
template <class Scalar, class Storage>
inline Vec<Scalar> load_state(const Storage* state, int64_t j, int64_t lanes) {
  return state ? load_upto(state + j, lanes) : Vec<Scalar>{};
}

// Loads the whole gradient of h: what later steps and the output contribute.
template <class Storage, class Scalar, class Element>
inline Vec<Scalar> load_gradient(const GradientRow<Storage, Scalar, Element>& row, int64_t j,
                                 int64_t lanes) {
  Vec<Scalar> grad = load_upto(row.grad[0] + j, lanes);
  if (row.grad_output) grad += load_upto(row.grad_output + j, lanes);
  return grad;
}

}  // namespace
}  // namespace namernn_fast
