// Defines the interface of a cell, a type that the forward and backward passes take as a template
// parameter. The passes use only the members below; register tiles and products do not depend on
// the cell. Each pass asserts what it assumes about the constants, so a cell with other values does
// not compile until that pass supports such a cell. A cell has these members:
// - kind, name: its CellKind, and its name in messages;
// - weight_blocks: number of blocks of H rows in weight_ih and in weight_hh, one per gate;
// - sums: number of blocks of H sums (values before the activation) in each row. The input
//   contributes to the first weight_blocks blocks, and the previous state to the weight_blocks
//   blocks from first_state_sum on;
// - input_block(sum): returns which block of weight_ih contributes to a sum. The blocks of
//   weight_hh are in the order of the sums that they contribute to;
// - sums_in_output: whether a row's sums are stored in its row of the output until the states
//   replace them;
// - kept: number of blocks of H values that a row keeps for the backward pass besides its output;
// - states: number of states of a row: 1, or 2 if there is a cell state, which the next step reads
//   without a product. The cell state is the last block of the kept values;
// - only_through_sums: whether the previous h affects the states only through sums. If not,
//   sum_gradients() also writes the part of the gradient of the previous h that bypasses the sums;
// - one_bias_gradient: whether bias_ih and bias_hh have the same gradient, the sum of all dz;
// - activations: number of nonlinearities among which `Layer::activation` may choose, in the order
//   of Activation;
// - can_project: whether a layer may project h. Such a cell is only_through_sums, and its
//   sum_gradients() also writes h before its projection;
// - has_rate: whether each hidden unit has a rate, and rows may have noise;
// - Cell(layer): reads what the cell needs from a Layer;
// - states_of(row): computes the states of a StateRow;
// - sum_gradients(row): computes the gradients of the sums of a GradientRow.
#pragma once

#include "contract.h"
#include "kernel/half.h"
#include "kernel/tanh.h"

namespace namernn_fast {
namespace {

// Returns the number of elements that the layer projects h to, or 0 if it does not project h.
template <class Cell, class Storage>
inline int64_t projected_size(const Layer<Storage>& layer) {
  return Cell::can_project && layer.P < layer.H ? layer.P : 0;
}

// What most cells have in common. A cell with other values hides these.
struct CellDefaults {
  static constexpr bool sums_in_output = false;
  static constexpr bool one_bias_gradient = true;
  static constexpr int64_t activations = 1;
  static constexpr bool can_project = false;
  static constexpr bool has_rate = false;
};

// What states_of() reads and writes for a range of hidden units of one row. Each pointer points to
// the first of these units, or is null if the cell lacks the value.
template <class Scalar, class Storage>
struct StateRow {
  const Scalar* sums;  // the blocks are `stride` apart
  int64_t stride;
  const Scalar* previous[kMostStates];  // states of the previous step; null means zeros.
                                        // previous[0] is null if the cell is only_through_sums
  Scalar* states[kMostStates];          // written; may alias `previous`, and states[0] may alias
                                        // `sums`
  Storage* kept;                        // written unless null; the blocks are H apart
  int64_t H;
  int64_t width;         // number of hidden units in the range
  const Scalar* rate;    // of each unit
  const Storage* noise;  // null means zeros
};

// What sum_gradients() reads and writes for a range of hidden units of one row. Each pointer points
// to the first of these units, or is null if the cell lacks the value. Elements is the type that
// points to elements of dz.
template <class Storage, class Scalar, class Elements>
struct GradientRow {
  const Storage* output;
  const Storage* kept;                   // the blocks are H apart
  const Storage* previous[kMostStates];  // states of the previous step; null means zeros.
                                         // previous[0] is null if the cell is only_through_sums and
                                         // so does not read it
  const Scalar* grad[kMostStates];       // gradients of the states, without the contribution of
                                         // grad_output
  const Storage* grad_output;            // null means zeros
  Elements dz;                           // written; the blocks are `stride` apart
  int64_t stride;
  Scalar* grad_previous[kMostStates];  // written: the part of a previous state's gradient that
                                       // bypasses the sums; may alias `grad`
  Scalar* unprojected;  // written unless null: h before its projection; may alias grad[0]
  const Scalar* rate;   // of each unit
  Scalar* grad_rate;    // added to: the gradients of the logits of the rates
  Storage* grad_noise;  // written unless null
  int64_t H;
  int64_t width;
};

// Returns `lanes` units of a state, starting at unit j. A null state counts as zeros.
template <class Scalar, class Storage>
inline Vec<Scalar> load_state(const Storage* state, int64_t j, int64_t lanes) {
  return state ? load_upto(state + j, lanes) : Vec<Scalar>{};
}

// Returns the total gradient of `lanes` units of h, starting at unit j: the contributions of later
// steps plus the gradient of the output.
template <class Storage, class Scalar, class Elements>
inline Vec<Scalar> load_gradient(const GradientRow<Storage, Scalar, Elements>& row, int64_t j,
                                 int64_t lanes) {
  Vec<Scalar> grad = load_upto(row.grad[0] + j, lanes);
  if (row.grad_output) grad += load_upto(row.grad_output + j, lanes);
  return grad;
}

}  // namespace
}  // namespace namernn_fast
