// Defines a cell by its sizes and by the functions that compute it. contract.h explains the names
// of sizes, such as H. Like contract.h, this header is compiled once per instruction set, so its
// structs have no member functions.
#pragma once

#include <cstdint>

#include "program.h"

namespace namernn_fast {

enum class Activation { tanh, relu, sigmoid, softplus };

// The values equal `Cell.number` in namernn_fast/cells/, and index Kernels::cells.
enum class CellKind { vanilla, gru, lstm, leaky, four_states, with_means, independent };
// Number of cells. Builds that define NAMERNN_FAST_TEST_CELLS also compile cells that only tests
// use. They have what no other cell has.
#if defined(NAMERNN_FAST_TEST_CELLS)
constexpr int64_t kCells = 7;
#else
constexpr int64_t kCells = 4;
#endif

// Maximum number of states of a cell. State 0 is the output h; the others, such as c in an LSTM,
// are its cell states. In arrays indexed by state, input or parameter, entries that the cell lacks
// are null.
constexpr int kMostStates = 4;
constexpr int kMostInputs = 8;  // maximum number of inputs besides x
constexpr int kMostOwn = 8;  // maximum number of parameters that only the cell's arithmetic reads
constexpr int kMostGates = 8;
constexpr int kMostSums = 16;

// Indices into arrays of one direction's parameters or parameter gradients. Operators take the
// parameters in this order.
enum Parameter { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr, kOwn };
constexpr int kParameters = kOwn + kMostOwn;

// Storage types for torch's bfloat16 and float16. Kernels for these types compute in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class Storage>
struct ComputeType {
  using Type = Storage;
};
template <>
struct ComputeType<BFloat16> {
  using Type = float;
};
template <>
struct ComputeType<Half> {
  using Type = float;
};
// The type that kernels compute in if tensors store elements of type Storage.
template <class Storage>
using Compute = typename ComputeType<Storage>::Type;

// A view of evenly spaced rows.
template <class Element>
struct EvenRows {
  Element* data;  // null if absent
  int64_t stride;
};

// The rows and the hidden units that a cell computes in one call.
struct Range {
  int64_t row;
  int64_t rows;
  int64_t unit;
  int64_t units;
};

// Arguments of `states_of`. Each EvenRows points to whole rows, but the cell processes only the
// rows and units in `range`. EvenRows are null for values that the cell lacks.
template <class Storage>
struct StateRows {
  using Scalar = Compute<Storage>;
  Range range;
  int64_t H;
  Activation activation;
  int64_t sum_stride;           // stride between one unit's sums in a row
  EvenRows<const Scalar> sums;  // covers only `range`
  // States of the previous step; null means zeros. h is always null if only_through_sums.
  EvenRows<const Scalar> previous[kMostStates];
  EvenRows<Scalar> states[kMostStates];  // written; may alias `previous`, and h may alias `sums`
  EvenRows<Storage> kept;                // written unless null; the blocks of a row are H apart
  EvenRows<const Storage> inputs[kMostInputs];  // null means zeros
  const Scalar* own[kMostOwn];  // the cell's own parameters, converted by `prepare_own`
  int64_t own_stride;           // stride between the blocks of a parameter in `own`
  const Program* program;       // of an equation
  Scalar* row_registers;        // [registers, H rounded up to vectors], if the program needs them
};

// Arguments of `sum_gradients`. EvenRows follow the same rules as in StateRows.
template <class Storage>
struct GradientRows {
  using Scalar = Compute<Storage>;
  Range range;
  int64_t H;
  Activation activation;
  int64_t sum_stride;  // stride between the gradients of one unit's sums in a row
  EvenRows<const Storage> output;
  EvenRows<const Storage> kept;
  EvenRows<const Storage> previous[kMostStates];
  EvenRows<const Storage> grad_output;       // null means zeros
  EvenRows<const Scalar> grad[kMostStates];  // gradients of the states, excluding grad_output
  EvenRows<Scalar> dz;                       // written: the gradients of the sums
  // Written: gradients that bypass the sums on the way to the previous states. May alias `grad`.
  EvenRows<Scalar> grad_previous[kMostStates];
  EvenRows<Scalar> unprojected;  // written unless null: h before its projection; may alias grad[0]
  EvenRows<const Storage> inputs[kMostInputs];  // null means zeros
  EvenRows<Storage> grad_inputs[kMostInputs];   // written unless null
  const Scalar* own[kMostOwn];
  int64_t own_stride;
  const Program* program;
  Scalar* row_registers;
  // Added to: gradients of the cell's own parameters, summed over rows. Blocks are H apart.
  Scalar* grad_own[kMostOwn];
};

// The arithmetic of a cell, compiled for one instruction set. Each call computes a tile or a chunk
// of rows. The passes do everything else.
template <class Storage>
struct CellCode {
  void (*states_of)(const StateRows<Storage>&);         // computes states from sums
  void (*sum_gradients)(const GradientRows<Storage>&);  // computes the gradients of the sums
  // Converts n elements of the cell's own parameter i to the form that kernels read.
  void (*prepare_own)(int64_t i, Compute<Storage>* own, int64_t n);
};

// The sizes and the arithmetic of a cell. Each cell is defined in its own file in cells/.
struct Cell : CellCode<float>, CellCode<double>, CellCode<BFloat16>, CellCode<Half> {
  const char* name;  // name in error messages
  int64_t gates;     // number of blocks of H rows in weight_ih and in weight_hh
  // Number of blocks of H sums (values before the activation) in each row. The input contributes to
  // the first `gates` blocks, and the previous h to `gates` blocks starting at first_state_sum.
  int64_t sums;
  int64_t first_state_sum;
  // The block of weight_ih that contributes to each sum. The blocks of weight_hh are in the order
  // of the sums that they contribute to.
  int64_t input_block[kMostGates];
  int64_t states;  // 1 for h, plus the number of cell states
  // Number of blocks of H values that a row keeps for the backward pass besides its output. The
  // last blocks are the cell states, in order.
  int64_t kept;
  int64_t inputs;  // number of inputs besides x
  const char* input_names[kMostInputs];
  // Whether a row of the input has one number for all units, instead of H. If so, the cell
  // gradients_need_rows, because the gradient of the number is a sum over units.
  bool input_is_number[kMostInputs];
  int64_t own;  // number of the cell's own parameters
  const char* own_names[kMostOwn];
  int64_t own_blocks[kMostOwn];  // number of blocks of H elements in each of these parameters
  int64_t activations;           // the cell supports the first `activations` values of Activation
  // Whether weight_hh multiplies the previous h. If not, units are independent of each other, and
  // the cell has no bias_hh.
  bool has_weight_hh;
  // Whether a layer may split h into heads, so that weight_hh is block-diagonal.
  bool can_have_heads;
  // Whether states_of() or sum_gradients() needs all units of a row in one call, because it
  // computes means over units. Threads then cannot split the units.
  bool states_need_rows;
  bool gradients_need_rows;
  // Whether the previous h affects the new states only through the sums. If not, sum_gradients()
  // also writes the gradient that reaches the previous h on other paths.
  bool only_through_sums;
  bool one_bias_gradient;  // whether bias_ih and bias_hh have the same gradient, the sum of all dz
  // Whether a layer may project h. If so, only_through_sums is true, and sum_gradients() also
  // writes h before its projection.
  bool can_project;
  const Program* program;  // what the functions of an equation's cell run; null for other cells
};

}  // namespace namernn_fast
