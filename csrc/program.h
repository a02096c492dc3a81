// The program of a cell that a user wrote as an equation: instructions that compute one step, and
// instructions that compute its gradients. csrc/library/ parses and checks programs, and
// cells/equation.h runs them. Compiled once per instruction set, like cell.h.
#pragma once

#include <cstdint>

namespace namernn_fast {

// The operations. a, b and c are the sources of an instruction, in order. Comparisons give 1 or 0.
// clang-format off
enum class Operation : uint8_t {
  copy, neg, abs, sign, sqrt, rsqrt, recip, exp, log, log1p, expm1, tanh, sigmoid, softplus,
  add, sub, mul, div, min, max,  // NaN if either source is NaN
  lt, le, eq,
  where,         // b if a is not 0, else c
  fma,           // a b + c
  fnma,          // c - a b
  tanh_grad,     // a (1 - b^2)
  sigmoid_grad,  // a b (1 - b)
  mean,          // the mean over the units of a row
  accumulate,    // adds a to the destination, for all rows
};
struct OperationInfo {
  const char* name;
  int sources;
};
constexpr OperationInfo kOperations[] = {
  {"copy", 1}, {"neg", 1}, {"abs", 1}, {"sign", 1}, {"sqrt", 1}, {"rsqrt", 1}, {"recip", 1},
  {"exp", 1}, {"log", 1}, {"log1p", 1}, {"expm1", 1}, {"tanh", 1}, {"sigmoid", 1}, {"softplus", 1},
  {"add", 2}, {"sub", 2}, {"mul", 2}, {"div", 2}, {"min", 2}, {"max", 2},
  {"lt", 2}, {"le", 2}, {"eq", 2}, {"where", 3}, {"fma", 3}, {"fnma", 3}, {"tanh_grad", 2},
  {"sigmoid_grad", 2}, {"mean", 1}, {"accumulate", 1},
};
// clang-format on
constexpr int kOperationCount = sizeof(kOperations) / sizeof(kOperations[0]);
static_assert(kOperationCount == int(Operation::accumulate) + 1);

// What has a value: the letters of a program's text, in order. "Full" values differ between rows
// and units, numbers belong to a row, and vectors have an element for each unit.
enum class Place : uint8_t {
  full,           // r: a register
  number,         // m: a register
  vector,         // v: a register
  constant,       // c
  units,          // n: the number of units
  sum,            // s
  previous,       // p: a previous state
  state,          // h: a new state
  kept,           // k: in the forward pass a register that a row may keep for the backward pass
  input,          // i: an input besides x
  own,            // o: a block of the cell's own parameters
  output,         // y: the new h, in the backward pass
  grad,           // g: the gradient of a new state
  dz,             // d: the gradient of a sum
  grad_previous,  // q: the gradient of a previous state
  grad_input,     // j
  grad_own,       // w
};
constexpr char kLetters[] = "rmvcnsphkioygdqjw";

// Maximum sizes of a program.
constexpr int kMostInstructions = 1024;
constexpr int kMostConstants = 64;
constexpr int kMostKept = 16;
constexpr int kMostFull = 64;     // registers
constexpr int kMostNumbers = 64;  // registers
constexpr int kMostVectors = 16;  // registers

// A value that a pass reads or writes. A program has one Slot for each, except that every
// instruction that writes a number has its own.
struct Slot {
  Place place;
  bool is_number;  // has one element in each row, or is a constant
  bool is_vector;  // has the same elements in all rows
  // The index among values that are live across several phases, which need memory for a whole row;
  // -1 for other values.
  int16_t row_register;
  int16_t index;      // index of the state, input, sum, register or constant
  int16_t parameter;  // the parameter to which a block belongs; `index` is its block
};

struct Instruction {
  Operation operation;
  bool of_numbers;  // computes one number in each row, in the first chunk of a row
  bool of_vectors;  // computes values that are the same in all rows
  bool only_kept;   // computes what only the backward pass reads
  int16_t destination;
  int16_t sources[3];
};

// Instructions first .. last, between which no value depends on a mean over the units that an
// earlier instruction of the same phase computes.
struct Phase {
  int16_t first;
  int16_t last;
  const int16_t* slots;  // [slot_count]: the slots outside registers that the phase uses
  int16_t slot_count;
};

// The instructions of one pass.
struct PassProgram {
  const Instruction* instructions;
  const Slot* slots;
  int64_t slot_count;
  const Phase* phases;
  int64_t phase_count;
  int64_t row_registers;     // number of values that need memory for a whole row
  int64_t first_kept_state;  // block i + first_kept_state of the kept values is state i
};

struct Program {
  PassProgram forward;
  PassProgram backward;
  const double* constants;
  uint64_t digest;  // of the text, to recognise the weights that were prepared for this program
};

}  // namespace namernn_fast
