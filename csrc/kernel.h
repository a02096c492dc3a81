// The torch-free contract between library.cpp and the kernels.
//
// Legend: T time steps, B sequences, D input features, H hidden units. A row is the vector that
// belongs to one (time, sequence) pair; N is the number of rows, T * B where nothing is padded.
//
// Only plain structs here, without member functions: this header is compiled into every ISA's
// objects, and an inline function with linkage could be merged across them by the linker.
#pragma once

#include <cstddef>
#include <cstdint>

namespace namernn_fast {

enum class Activation { tanh, relu };

// The 16-bit types of torch, as they are stored. They are computed with in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Which rows exist. At time t the sequences 0 .. count[t]-1 are alive; count never grows with t.
struct Steps {
  int64_t T;
  int64_t B;
  int64_t N;
  const int64_t* count;   // [T], or null: B at every time
  const int64_t* start;   // [T], number of rows before time t; or null: rows lie at (t, b) strides
  const int64_t* order;   // [B], which of the caller's sequences b is; or null: the same
  const int64_t* origin;  // [B], the place of sequence b's rows among sequences; or null: b
};

// Where the rows of a tensor lie. Without `start`, row (t, b) is data + t * time_stride +
// origin[b] * row_stride; with it, data + (start[t] + b) * row_stride. Features are adjacent.
template <class Scalar>
struct Rows {
  Scalar* data;  // null: the tensor is absent and reads as zeros
  int64_t time_stride;
  int64_t row_stride;
};

// Cuts between a time and the one before it, which no state crosses: behind one it is zero.
struct Resets {
  const bool* at;  // (t, b), b as in Steps, is at[t * time_stride + b]; null: there are none
  int64_t time_stride;
};

// A chain of so many multiply-adds at most ends in one addition to the sum so far: the rounding
// error of a long product grows with the chain, and this keeps it at that of other BLAS kernels.
constexpr int64_t kChain = 64;

// Those of the forward pass.
struct Chains {
  int64_t projection = kChain;
  int64_t recurrence = kChain;
};

// For few rows or columns other kernels sum in lanes, in chains of a few, and chain ends take
// little of the time. All rows count, whoever computes them: bits do not depend on how work is
// shared.
inline Chains choose_chains(const Steps& steps, int64_t H) {
  const auto chain = [H](int64_t rows) {
    const int64_t few = rows < H ? rows : H;
    return few <= 2 ? kChain / 4 : few <= 12 ? kChain / 2 : kChain;
  };
  return {chain(steps.N), chain(steps.B)};
}

// One direction of one layer: what forward and backward share.
template <class Scalar>
struct Layer {
  Steps steps;
  int64_t D;
  int64_t H;
  bool reverse;
  Activation activation;
  Rows<const Scalar> input;  // (t, b) -> [D]
  const Scalar* hx;          // [B, H], or null: zeros
  int64_t hx_stride;
  const Scalar* weight_ih;  // [H, D]
  const Scalar* weight_hh;  // [H, H]
  const Scalar* bias_ih;    // [H], or null
  const Scalar* bias_hh;    // [H], or null
  const void* packed;       // what forward or backward reads in their place, from `pack`; or null
  Resets resets;
  bool batch_invariant;  // a sequence's results are not to depend on the others of its batch
  Chains chains;
};

template <class Scalar>
struct Forward {
  Layer<Scalar> layer;
  Rows<Scalar> output;  // (t, b) -> [H]
  Scalar* h_n;          // [B, H]
};

template <class Scalar>
struct Backward {
  Layer<Scalar> layer;
  Rows<const Scalar> output;       // (t, b) -> [H]
  Rows<const Scalar> grad_output;  // (t, b) -> [H], or absent
  const Scalar* grad_h_n;          // [B, H], or null; any strides, as `sum` leaves them
  int64_t grad_h_n_stride;
  int64_t grad_h_n_step;    // from one feature to the next
  Rows<Scalar> grad_input;  // (t, b) -> [D], or absent: not wanted
  bool accumulate_input;    // add to grad_input instead of writing it
  Scalar* grad_hx;          // [B, H], or null: not wanted
  bool accumulate_weights;  // likewise, to the gradients of the parameters; not in 16 bits
  Scalar* grad_weight_ih;   // [H, D], or null: no parameter gradient is wanted
  Scalar* grad_weight_hh;   // [H, H]
  Scalar* grad_bias;        // [H], the gradient of either bias, or null: there is none
};

// How the recurrence of one direction is shared out: groups x members threads. Every group takes
// sequences of its own through all steps; its members take hidden units of these sequences each,
// with a barrier after every step.
struct Plan {
  int64_t groups;
  int64_t members;
  double time;  // in ns, as the rule's model has it
};

struct Machine {
  int64_t threads;
  size_t near_bytes;  // of a core's own cache
};

// The rule is in plan.cpp; `panels` is the number of column panels that members can share out.
Plan choose_plan(const Steps& steps, const Machine& machine, int64_t D, int64_t H, int64_t panels,
                 size_t scalar_bytes);

// How layers that feed each other run at once, a thread each: a stretch of so many steps after the
// other, each as soon as the layer before has done it.
struct Wave {
  int64_t layers;  // at once; 1: they run one after the other
  int64_t steps;   // of a stretch
};

enum class Pass { forward, backward };

// Up to so many steps a single sequence may be computed from weights that nobody packs, with other
// last bits: no wave, which packs them, so that bits do not depend on the number of threads.
constexpr int64_t kUnpackedSteps = 16;

Wave choose_wave(const Steps& steps, const Machine& machine, int64_t H, int64_t panels,
                 size_t scalar_bytes, int64_t layers, Pass pass);

// Whether two directions are done sooner at once, with one thread each, than one after the other
// with all threads.
bool choose_both_at_once(const Steps& steps, const Machine& machine, int64_t D, int64_t H,
                         int64_t panels, size_t scalar_bytes);

// How many threads are worth having for so many multiply-adds that do not depend on each other.
int64_t choose_workers(double multiply_adds, const Machine& machine);

// What a kernel needs from the process it runs in.
struct Runtime {
  Machine machine;
  // Calls body(context, begin, end) over a partition of 0 .. n, on several threads where it can.
  void (*parallel)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
  // Memory for this call, aligned to 64 bytes and uninitialised.
  void* (*scratch)(size_t bytes);
  void (*yield)();
};

// The weights of a layer as a pass reads them: so many bytes of memory, and what fills them.
template <class Storage>
struct Packing {
  size_t (*bytes)(int64_t D, int64_t H);
  void (*pack)(const Layer<Storage>&, void* packed, const Runtime&);
};

template <class Storage>
struct KernelsFor {
  Packing<Storage> forward_packing;
  void (*forward)(const Forward<Storage>&, const Runtime&);
  Packing<Storage> backward_packing;  // null where it packs at every call
  void (*backward)(const Backward<Storage>&, const Runtime&);
};

struct Kernels : KernelsFor<float>, KernelsFor<double>, KernelsFor<BFloat16>, KernelsFor<Half> {
  const char* name;
  const char* bfloat16_name;  // of what computes bfloat16
  int64_t panel_width;        // columns of float that threads share out, at least
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// Further kernels for bfloat16, to take the place of those of kernels_avx512.
extern const KernelsFor<BFloat16> kernels_avx512_bf16;
extern const KernelsFor<BFloat16> kernels_amx;

}  // namespace namernn_fast
