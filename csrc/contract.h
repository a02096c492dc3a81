// The contract between csrc/library/, which sees torch, and csrc/kernel/, which does not.
//
// Legend: T time steps, B sequences, D input features, H hidden units. A row is the vector of
// features that belongs to one (time, sequence) pair; N is the number of rows, T * B where nothing
// is padded.
//
// Glossary of the native code (docs/architecture.md has that of the whole project):
// - step, time: an index along the sequence, never a distance in memory, which is a stride;
// - layout: which rows exist and in what order, a SequenceLayout;
// - panel: columns of a matrix in the order in which a register tile reads them;
// - tile: the piece of a product that one call computes in registers;
// - time block: the stretch of time whose rows a pass keeps in cache together;
// - group, member: threads; groups share out the sequences, the members of a group hidden units;
// - slice, columns: a range of sequences, a range of hidden units; a part is a slice x columns;
// - wave, stretch: layers that run at once, a thread each; the steps that each does at a time;
// - lane: one element of a SIMD vector;
// - plan: whatever is decided from sizes alone, in plan.h;
// - table: what stands for the input products where the input is token ids, a row for each id;
// - tree: sequences that share the states of equal beginnings, a PrefixTree.
//
// This header is compiled into the objects of every instruction set, and the linker may merge an
// inline function across them: so there are only plain structs here, without member functions or
// default member values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace namernn_fast {

enum class Activation { tanh, relu };

// The 16-bit types of torch, as they are stored. Kernels compute with them in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Sequences whose beginnings are shared: each row is a beginning that some of them have in common,
// and several rows may continue one row of the time before. All begin from a state of zeros.
struct PrefixTree {
  const int64_t* parent;  // [N], for each row the number b of the row (t - 1, b) that it continues;
                          // not read at time 0
  const int64_t* end_start;     // [N + 1], the sequences that end in row n are
                                // end_sequence[end_start[n]] .. end_sequence[end_start[n + 1] - 1]
  const int64_t* end_sequence;  // [end_start[N]], the caller's numbers
};

// Which rows exist. At time t the sequences 0 .. count[t]-1 are alive; count never grows with t.
//
// A tree has the rows 0 .. count[t]-1 at time t instead, as many as it likes, and B is the most
// rows of a time. It has `count` and `start`, no `order`, no `origin`, no resets and no hx, goes
// forward in time, and is computed in float or double by a plan of one group and one member. h_n
// and its gradient have a row for each sequence that ends in the tree.
struct SequenceLayout {
  int64_t T;
  int64_t B;
  int64_t N;
  const int64_t* count;    // [T], or null: B at every time
  const int64_t* start;    // [T], number of rows before time t; or null: rows lie at (t, b) strides
  const int64_t* order;    // [B], the caller's number of sequence b; or null: b
  const int64_t* origin;   // [B], where the rows of sequence b lie, in row strides; or null: b
  const PrefixTree* tree;  // or null: no sequences share rows
};

// Where the rows of a tensor lie. Without `start`, row (t, b) is data + t * time_stride +
// origin[b] * row_stride; with `start`, data + (start[t] + b) * row_stride. Features are adjacent.
template <class Scalar>
struct RowStrides {
  Scalar* data;  // null: the tensor is absent and reads as zeros
  int64_t time_stride;
  int64_t row_stride;
};

// Cuts between a time and the time before, which no state crosses: behind a cut the state is zero.
struct Resets {
  const bool* at;  // (t, b), b as in SequenceLayout, is at[t * time_stride + b]; null: no cuts
  int64_t time_stride;
};

// What stands for the products of the inputs with weight_ih where the input is token ids: row
// ids(t, b) of a table of such products. The biases are added to it, and with a table they are read
// from the layer even where `panels` has them.
template <class Scalar>
struct TokenTable {
  RowStrides<const int64_t> ids;  // (t, b) -> id, without features; absent: the layer has inputs
  const Scalar* rows;             // [V, H]
  int64_t V;
};

// Longest chains of multiply-adds of the two products of the forward pass: see kChain.
struct Chains {
  int64_t projection;
  int64_t recurrence;
};

// The weights that the forward pass reads where the caller stores them, because packing would take
// longer than it gains.
struct InPlace {
  bool weight_ih;
  bool weight_hh;
};

// A chain of so many multiply-adds at most ends in one addition to the sum so far: the rounding
// error of a long product grows with the chain, and this keeps the error at that of other BLAS
// kernels.
constexpr int64_t kChain = 64;

// The gradients of so many rows, about, gather apart from large sums before they are added to them.
constexpr int64_t kRowsApart = 4096;

// One direction of one layer: what forward and backward share.
template <class Scalar>
struct Layer {
  SequenceLayout layout;
  int64_t D;  // 0 with a table
  int64_t H;
  bool reverse;
  Activation activation;
  RowStrides<const Scalar> input;  // (t, b) -> [D]; absent with a table
  TokenTable<Scalar> table;
  const Scalar* hx;  // [B, H], or null: zeros
  int64_t hx_stride;
  const Scalar* weight_ih;  // [H, D], or null with a table
  const Scalar* weight_hh;  // [H, H]
  const Scalar* bias_ih;    // [H], or null
  const Scalar* bias_hh;    // [H], or null
  const void* panels;       // the weights in the order of a PanelFormat; or null: not made yet
  Resets resets;
  bool batch_invariant;  // the results of a sequence must not depend on the rest of its batch
  Chains chains;
  InPlace in_place;
};

template <class Scalar>
struct Forward {
  Layer<Scalar> layer;
  RowStrides<Scalar> output;  // (t, b) -> [H], or absent: not wanted; a tree has one
  Scalar* h_n;                // [B, H]
};

template <class Scalar>
struct Backward {
  Layer<Scalar> layer;
  RowStrides<const Scalar> output;       // (t, b) -> [H]
  RowStrides<const Scalar> grad_output;  // (t, b) -> [H], or absent
  const Scalar* grad_h_n;  // [B, H], or null; any strides, as `sum` leaves them. Of a tree: with
                           // adjacent features
  int64_t grad_h_n_stride;
  int64_t grad_h_n_feature_stride;
  RowStrides<Scalar> grad_input;  // (t, b) -> [D], or absent: not wanted
  bool accumulate_input;          // add to grad_input instead of writing it
  Scalar* grad_hx;                // [B, H], or null: not wanted
  bool accumulate_weights;        // add to the gradients of the parameters; not in 16 bits
  Scalar* grad_weight_ih;  // [H, D], or the gradient of the table [V, H]; or null: no parameter
                           // gradient is wanted
  Scalar* grad_weight_hh;  // [H, H]
  Scalar* grad_bias;       // [H], the gradient of either bias; or null: there is no bias
};

struct Machine {
  int64_t threads;
  size_t l2_bytes;  // of a core's own cache
};

// What a kernel needs from the process it runs in.
struct Runtime {
  Machine machine;
  // Calls body(context, begin, end) over a partition of 0 .. n, on several threads where it can.
  void (*parallel)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
  // Memory for this call, aligned to 64 bytes and uninitialised.
  void* (*scratch)(size_t bytes);
  void (*yield)();
};

// Weights of a layer as one pass reads them, in panels: how many bytes, and what fills them.
template <class Storage>
struct PanelFormat {
  size_t (*bytes)(int64_t D, int64_t H);
  void (*pack)(const Layer<Storage>&, void* panels, const Runtime&);
};

template <class Storage>
struct KernelsFor {
  PanelFormat<Storage> forward_panels;
  void (*forward)(const Forward<Storage>&, const Runtime&);
  PanelFormat<Storage> backward_panels;  // null members: the pass makes its panels at every call
  void (*backward)(const Backward<Storage>&, const Runtime&);
  // Writes the rows of the layer's table with its biases, [V, H] in the type that kernels compute
  // in. Null: no caller keeps a table.
  void (*add_biases)(const Layer<Storage>&, void* table, const Runtime&);
  int64_t panel_rate;  // of products with panels, in products of float
};

struct Kernels : KernelsFor<float>, KernelsFor<double>, KernelsFor<BFloat16>, KernelsFor<Half> {
  const char* name;
  const char* bfloat16_name;  // of the instructions that compute bfloat16
  int64_t panel_width;        // columns of float that threads share out, at least
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// Kernels for bfloat16 that take the place of those in kernels_avx512.
extern const KernelsFor<BFloat16> kernels_avx512_bf16;
extern const KernelsFor<BFloat16> kernels_amx;

}  // namespace namernn_fast
