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

// Which rows exist. At time t the sequences 0 .. count[t]-1 are alive; count never grows with t.
struct Steps {
  int64_t T;
  int64_t B;
  int64_t N;
  const int64_t* count;  // [T], or null: B at every time
  const int64_t* start;  // [T], number of rows before time t; or null: rows lie at (t, b) strides
};

// Where the rows of a tensor lie. Without `start`, row (t, b) is data + t * time_stride +
// b * row_stride; with it, data + (start[t] + b) * row_stride. Features are adjacent.
template <class Scalar>
struct Rows {
  Scalar* data;  // null: the tensor is absent and reads as zeros
  int64_t time_stride;
  int64_t row_stride;
};

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
  const Scalar* grad_h_n;          // [B, H], or null
  int64_t grad_h_n_stride;
  Rows<Scalar> grad_input;  // (t, b) -> [D], or absent: not wanted
  bool accumulate_input;    // add to grad_input instead of writing it
  Scalar* grad_hx;          // [B, H], or null: not wanted
  Scalar* grad_weight_ih;   // [H, D], or null: no parameter gradient is wanted
  Scalar* grad_weight_hh;   // [H, H]
  Scalar* grad_bias;        // [H], the gradient of either bias, or null: there is none
};

// How the work of one direction is shared out.
struct Plan {
  enum Split {
    serial,  // one thread
    batch,   // every thread takes sequences through all steps: no barrier
    hidden,  // every thread takes hidden units of all sequences: one barrier a step
  } split;
  int64_t workers;
};

// The rule is in plan.cpp; `panels` is the number of column panels that `hidden` can share out.
Plan choose_plan(const Steps& steps, int64_t D, int64_t H, int64_t panels, size_t scalar_bytes,
                 int64_t threads);

// What a kernel needs from the process it runs in.
struct Runtime {
  int64_t threads;
  // Calls body(context, begin, end) over a partition of 0 .. n, on several threads where it can.
  void (*parallel)(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);
  // Memory for this call, aligned to 64 bytes and uninitialised.
  void* (*scratch)(size_t bytes);
  void (*yield)();
};

struct Kernels {
  const char* name;
  void (*forward_float)(const Forward<float>&, const Runtime&);
  void (*forward_double)(const Forward<double>&, const Runtime&);
  void (*backward_float)(const Backward<float>&, const Runtime&);
  void (*backward_double)(const Backward<double>&, const Runtime&);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace namernn_fast
