// The interface between csrc/library/, which uses torch, and csrc/kernel/, which does not.
//
// Legend: T, B, D, H, P and V are the numbers of time steps, sequences, input features, hidden
// units, elements of h and token ids. P is H unless the layer projects h. A row holds the features
// of one (time, sequence) pair; N is the number of rows, T * B if all sequences are equally long. A
// range first .. last does not include `last`. In a cell with gates, weights and biases have one
// block of H rows per gate: for a weight or bias, [H, ..] means [3 H, ..] in a GRU.
//
// Glossary of the native code (docs/architecture.md has the glossary of the whole project):
// - step, time: an index along the sequence; a distance in memory is a stride;
// - layout: which rows exist and in what order, a SequenceLayout;
// - panel: some columns of a matrix, stored in the order in which a register tile reads them;
// - tile: the part of a product that one call computes in registers;
// - time block: a range of times whose rows fit in cache together;
// - group, member: a pass runs on groups of threads; the groups split the sequences, the members of
//   a group split the hidden units;
// - slice, columns, outputs: ranges of sequences, of hidden units and of elements of h; a part
//   combines one of each;
// - wave: layers that run at the same time, one thread per layer; a stretch is a range of steps,
//   computed by one layer of a wave at a time;
// - lane: one element of a SIMD vector;
// - plan: the decisions made from sizes alone, in plan.h;
// - table: the input products of all token ids, one row per id, used if the input is token ids;
// - tree: sequences that share the states of common prefixes, a PrefixTree.
//
// This header is compiled once per instruction set. The linker keeps only one copy of an inline
// function, perhaps the AVX-512 copy, which not every processor can run. So the structs here have
// neither member functions nor default member values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cell.h"

namespace namernn_fast {

// Sequences that share common prefixes, so that each shared state is computed once. Each row stands
// for one prefix, and several rows may continue the same row of the previous step. All initial
// states are zeros.
struct PrefixTree {
  // [N]: row n, at time t, continues row (t - 1, parent[n]). Not read at t = 0.
  const int64_t* parent;
  // [N + 1]: the sequences that end in row n are end_sequence[end_start[n] .. end_start[n + 1]].
  const int64_t* end_start;
  const int64_t* end_sequence;  // [end_start[N]]: indices of sequences in the last states
};

// Which rows exist. At time t the first count[t] sequences are alive, which means that they have a
// row. count[t] never increases with t.
//
// In a tree, count[t] is the number of rows at time t; count[t] may increase with t, and B is its
// maximum. A tree has `count` and `start` but no `order`, `origin`, resets or initial states. A
// tree runs forward in time, in float or double, with a plan of one group and one member. The last
// states and their gradients have one row for each sequence that ends in the tree.
struct SequenceLayout {
  int64_t T;
  int64_t B;
  int64_t N;
  const int64_t* count;    // [T]; null if all B sequences are alive at every time
  const int64_t* start;    // [T]: number of rows before time t; may be null (see RowStrides)
  const int64_t* order;    // [B]: index of sequence b in initial and last states; null means b
  const int64_t* origin;   // [B]: offset of sequence b's rows, in row strides; null means b
  const PrefixTree* tree;  // null if no sequences share rows
};

// Where a tensor's rows are in memory. If the layout has `start`, row (t, b) is at
// data + (start[t] + b) * row_stride, otherwise at data + t * time_stride + origin[b] * row_stride.
// The features of a row are contiguous.
template <class Scalar>
struct RowStrides {
  Scalar* data;  // null if the tensor is absent; an absent tensor reads as zeros
  int64_t time_stride;
  int64_t row_stride;
};

// Where sequences are cut. At a cut between two consecutive times, the recurrence discards the
// state and restarts from zeros or from the rows of Layer::reset_to.
struct Resets {
  // Null, or at[t * time_stride + b]: whether the layout's sequence b is cut between t - 1 and t.
  const bool* at;
  int64_t time_stride;
};

// The input products of all token ids. If the input is token ids, row ids(t, b) of this table
// replaces W_ih x_t. Kernels add the biases of the layer to that row, and ignore the bias packed in
// Layer::panels.
template <class Scalar>
struct TokenTable {
  RowStrides<const int64_t> ids;  // (t, b) -> id; absent if the input is features
  const Scalar* rows;             // [V, H]
  int64_t V;
  // Null, or the rows plus the biases [V, H] in the type that kernels compute in. If not null, a
  // pass reads `biased` instead of adding the biases to `rows`. In float and double, `rows` then
  // points to the same array.
  const void* biased;
};

// Maximum number of chained multiply-adds in each product of the forward pass; see kChain.
struct Chains {
  int64_t projection;
  int64_t recurrence;
};

// Which weights the forward pass reads directly from the caller's tensors, because packing these
// weights into panels would cost more time than it saves.
struct InPlace {
  bool weight_ih;
  bool weight_hh;
};

// Maximum number of multiply-adds accumulated before the partial sum is added to the total. The
// rounding error of a long product grows with this length; at 64 the error is comparable to the
// error of BLAS libraries.
constexpr int64_t kChain = 64;

// Gradients of about this many rows accumulate in a separate buffer before they join the running
// sum.
constexpr int64_t kRowsApart = 4096;

// The states that sequences restart from at cuts. The state of the caller's sequence b at time t is
// at data + t * time_stride + b * stride; it is used only if the sequence is cut before time t.
template <class Scalar>
struct RestartStates {
  Scalar* data;  // null means zeros
  int64_t time_stride;
  int64_t stride;
};

// One direction of one layer: the arguments that the forward and the backward pass share.
template <class Scalar>
struct Layer {
  const Cell* cell;
  SequenceLayout layout;
  int64_t D;  // number of input features; 0 if a token table or sums are given
  int64_t H;
  int64_t P;      // less than H if the layer projects h, otherwise H
  int64_t heads;  // 1, or the number of blocks on the diagonal of weight_hh
  bool reverse;
  Activation activation;
  RowStrides<const Scalar> input;  // (t, b) -> [D]; absent if a token table is given
  // Whether `input` holds W_ih x_t, (t, b) -> [gates, H], in the order of the blocks of weight_ih.
  bool sums_given;
  TokenTable<Scalar> table;
  // [B, P] for h and [B, H] for each cell state. All are null if the states are zeros.
  EvenRows<const Scalar> initial[kMostStates];
  // weight_ih [H, D], weight_hh [H, P / heads], bias_ih [H], bias_hh [H], weight_hr [P, H] if the
  // layer projects h, and the cell's own parameters [own_blocks, H]. Null if absent; TokenTable
  // replaces weight_ih. A unit multiplies the elements of h that belong to its head.
  const Scalar* parameters[kParameters];
  RowStrides<const Scalar> inputs[kMostInputs];  // (t, b) -> [H] or [1]; absent means zeros
  // The packed weights; a pass may convert their format. Null if the pass packs the weights.
  const void* panels;
  Resets resets;
  // Present for all states of the cell, or for none. Absent in a reverse layer.
  RestartStates<const Scalar> reset_to[kMostStates];
  bool batch_invariant;  // a sequence's results must not depend on the other sequences in the batch
  Chains chains;
  InPlace in_place;
};

// Float states of a layer with 16-bit tensors.
struct FloatStates {
  const float* initial[kMostStates];  // replace Layer::initial unless null
  float* last[kMostStates];           // replace Forward::last unless null
};

template <class Scalar>
struct Forward {
  Layer<Scalar> layer;
  RowStrides<Scalar> output;  // (t, b) -> [P]; absent if not requested; always present for a tree
  // (t, b) -> [blocks, H]: values that the backward pass reads. Absent if not requested.
  RowStrides<Scalar> kept;
  // [B, P] and [B, H], the last states. Those of cell states may alias Layer::initial.
  Scalar* last[kMostStates];
  FloatStates float_states;  // null unless tensors have 16 bits and layout.order is null
};

// Gradients of the last h [B, P] or cell states [B, H]. Strides are arbitrary; for example, the
// gradient of torch's sum() has strides of 0.
template <class Scalar>
struct StateGradients {
  const Scalar* data;  // null means zeros
  int64_t stride;
  int64_t feature_stride;  // always 1 for a tree
};

template <class Scalar>
struct Backward {
  Layer<Scalar> layer;
  RowStrides<const Scalar> output;       // (t, b) -> [P]
  RowStrides<const Scalar> kept;         // (t, b) -> [blocks, H], as in Forward
  RowStrides<const Scalar> grad_output;  // (t, b) -> [P], or absent
  StateGradients<Scalar> grad_last[kMostStates];
  RowStrides<Scalar> grad_input;                // shaped like Layer::input; absent if not requested
  bool accumulate_input;                        // add to grad_input instead of overwriting it
  RowStrides<Scalar> grad_inputs[kMostInputs];  // like Layer::inputs; absent if not requested
  // (t, b) -> [sums, H]: dz, the gradients of the sums that the cell reads. Absent if not
  // requested. If present, the gradients of the matrices and biases are not computed; then
  // Layer::panels holds the weights.
  RowStrides<Scalar> grad_sums;
  Scalar* grad_initial[kMostStates];  // shaped like `last`; null for all states or for none
  // Written only at cuts. Present for all states of the cell, or for none.
  RestartStates<Scalar> grad_reset_to[kMostStates];
  bool accumulate_weights;  // whether to add to `grads`; false in 16-bit and pair kernels
  // Shaped like Layer::parameters. The gradient of a token table [V, H] replaces the gradient
  // of weight_ih. Null if the layer lacks the parameter, and for bias_hh if both biases have the
  // same gradient. All are null unless wants_weights.
  Scalar* grads[kParameters];
  bool wants_weights;  // whether parameter gradients are requested
};

struct Machine {
  int64_t threads;
  size_t l2_bytes;  // size of a core's private cache, usually L2
};

// What a kernel needs from the process that it runs in.
struct Runtime {
  Machine machine;
  // Calls body(context, begin, end), on several threads if possible, for ranges that together
  // cover 0 .. n.
  void (*parallel)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
  // Returns uninitialized memory, aligned to 64 bytes, that lives until the kernel returns.
  void* (*scratch)(size_t bytes);
  // Lets the operating system run another thread during a long wait. Returns whether the yield took
  // so long that another program has probably used the processor.
  bool (*yield)();
  // Sleeps until wake() is called with the same address, for at most a millisecond. Returns at once
  // if the number at that address is not `value`. May return early.
  void (*sleep)(const uint32_t* address, uint32_t value);
  void (*wake)(const uint32_t* address);
  uint32_t (*processor)();  // 1 + the index of the processor that runs the caller; 0 if unknown
};

// Functions that pack a layer's weights for one pass. `bytes` returns the size of the panels, which
// depends only on the layer's sizes. `pack` fills the panels. `unpack` copies weight_ih, weight_hh
// and weight_hr from Layer::panels to `weights`; it is null for backward panels.
template <class Storage>
struct PanelFormat {
  size_t (*bytes)(const Layer<Storage>&);
  void (*pack)(const Layer<Storage>&, void* panels, const Runtime&);
  void (*unpack)(const Layer<Storage>&, Storage* const (&weights)[kParameters]);
};

// When products with panels are faster than products in place.
struct PanelGain {
  // How many times faster a product with panels is, divided by the same ratio for float kernels
  // with AVX-512.
  int64_t rate;
  int64_t most_rows;  // with more rows, panels are faster, no matter how large the weights are
};
struct PanelGains {
  PanelGain few;   // with fewer than 8 sequences
  PanelGain many;  // with 8 sequences or more
};

// The kernels for tensors of type Storage.
template <class Storage>
struct KernelsFor {
  PanelFormat<Storage> forward_panels;
  void (*forward)(const Forward<Storage>&, const Runtime&);
  PanelFormat<Storage> backward_panels;  // all members are null if each call packs panels
  void (*backward)(const Backward<Storage>&, const Runtime&);
  // Writes the layer's table plus the biases to `table` [V, H], in the type that kernels compute
  // in. Waves and trees call `add_biases` once for many calls to `forward`; null for types that
  // neither waves nor trees support.
  void (*add_biases)(const Layer<Storage>&, void* table, const Runtime&);
  PanelGains panel_gains;
};

// Forward kernels for float layers with weights in 8-bit integers and one scale per row. The
// kernels require Layer::panels. `unpack` returns each integer times the scale of its row.
struct Int8Kernels {
  KernelsFor<float> kernels;
  const char* name;  // name of the instructions that multiply the integers
};
// Maximum number of inputs or hidden units of a layer with 8-bit weights. Longer sums might
// overflow 32 bits.
constexpr int64_t kMostInt8Inputs = INT32_MAX / (255 * 127);

// The kernels and cells for one instruction set.
struct Kernels : KernelsFor<float>, KernelsFor<double>, KernelsFor<BFloat16>, KernelsFor<Half> {
  Cell cells[kCells];
  Cell equation;  // only functions, which run Cell::program
  const char* name;
  const char* bfloat16_name;  // the instructions that bfloat16 kernels use, unless h is projected
  int64_t panel_width;  // columns per float panel; threads split hidden units at panel boundaries
  const Int8Kernels* int8;
  // Kernels that multiply pairs of bfloat16, or null if they would not be faster: float kernels for
  // each number of terms [kMostTerms], and bfloat16 kernels for layers that do not project h.
  const KernelsFor<float>* float_on_pairs;
  const KernelsFor<BFloat16>* bfloat16_on_pairs;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// Values of Kernels::bfloat16_on_pairs, each named after the instructions that it needs.
extern const KernelsFor<BFloat16> kernels_avx512_bf16;
extern const KernelsFor<BFloat16> kernels_amx;

// Maximum number of bfloat16 terms that a float is split into before it is multiplied. With one
// term, the float is rounded to bfloat16.
constexpr int64_t kMostTerms = 2;
// Element i: float kernels that split each number into i + 1 terms.
extern const KernelsFor<float> kernels_amx_float[kMostTerms];

extern const Int8Kernels int8_kernels_baseline;
extern const Int8Kernels int8_kernels_avx2;
extern const Int8Kernels int8_kernels_avx_vnni;
extern const Int8Kernels int8_kernels_avx512_vnni;
extern const Int8Kernels int8_kernels_amx;

}  // namespace namernn_fast
