// Runs the forward pass of one short sequence through a small layer. Reads the weights where the
// caller stores them, and adds up the lanes of projection and recurrence together. Packing the
// weights, or computing the two products separately, would make the pass take about 10 % longer.
#pragma once

#include "kernel/forward_rows.h"

namespace namernn_fast {
namespace {

// Returns whether forward_short() supports the call, the layer is small, and its only sequence is
// short. forward_short() requires D and H to be multiples of the number of lanes in a vector.
template <class Scalar>
inline bool is_short(const Layer<Scalar>& layer) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  constexpr int64_t most_steps = 16;
  // With more features, it is faster to read fewer rows of the weights at once.
  constexpr int64_t most_features = 512;
  const int64_t T = layer.layout.T;
  return layer.layout.B == 1 && !layer.layout.origin && !layer.layout.tree &&
         !layer.batch_invariant && !layer.resets.at && !layer.panels && T <= most_steps &&
         layer.D + layer.H <= most_features && T * layer.D <= 4 * (layer.D + layer.H) &&
         layer.D % lanes == 0 && layer.H % lanes == 0;
}

// acc[r] += W[r, K] x[K], lane by lane, for as many rows of W as a vector has lanes.
template <class Scalar>
inline void accumulate_rows(const Scalar* w, int64_t K, const Scalar* x,
                            Vec<Scalar> (&acc)[Simd<Scalar>::lanes]) {
  constexpr int lanes = Simd<Scalar>::lanes;
  for (int64_t k = 0; k < K; k += lanes) {
    const Vec<Scalar> xk = load(x + k);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) acc[r] += load(w + r * K + k) * xk;
  }
}

// Runs one part's forward pass. `zeros` [H] is the initial state if the caller gives none.
template <class Cell, class Scalar>
inline void forward_short_part(const Forward<Scalar>& args, const Scalar* zeros, const Part& part,
                               const Runtime& runtime) {
  static_assert(Cell::sums == 1 && Cell::sums_in_output, "the sums are stored in the output");
  const Layer<Scalar>& layer = args.layer;
  const Cell cell(layer);
  const int64_t T = layer.layout.T;
  const auto [first, last] = part.columns;
  const Scalar* h = layer.initial[0].data ? layer.initial[0].data : zeros;
  for (int64_t s = 0; s < T; ++s) {
    const int64_t t = time_of(layer, s);
    Scalar* out = row_at(args.output, layer.layout, t, 0);
    const Scalar* x = input_row(layer, t, 0);
    const Scalar* looked_up = has_table(layer) ? table_row(layer, t, 0, layer.H) : nullptr;
    for (int64_t j = first; j < last; j += Simd<Scalar>::lanes) {
      Vec<Scalar> acc[Simd<Scalar>::lanes] = {};
      accumulate_rows(layer.weight_ih + j * layer.D, layer.D, x, acc);
      accumulate_rows(layer.weight_hh + j * layer.H, layer.H, h, acc);
      Vec<Scalar> z = sum_lanes<Scalar>(acc);
      if (looked_up) z += load(looked_up + j);
      if (layer.bias_ih) z += load(layer.bias_ih + j);
      if (layer.bias_hh) z += load(layer.bias_hh + j);
      store(out + j, z);
    }
    Scalar* row = out + first;
    cell.states_of(StateRow<Scalar, Scalar>{row, 0, {}, {row}, nullptr, layer.H, last - first});
    h = out;
    if (part.team && s + 1 < T) barrier(*part.team, runtime);
  }
  std::memcpy(args.last[0] + first, h + first, (last - first) * sizeof(Scalar));
}

template <class Cell, class Scalar>
inline void forward_short(Forward<Scalar> args, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  // If the caller wants no output, writes the output to scratch memory. The last state then has the
  // same bits as with an output.
  if (!args.output.data) {
    args.output = {scratch<Scalar>(runtime, layer.layout.T * layer.H), layer.H, layer.H};
  }
  const Plan plan = forward_plan<Cell>(layer, runtime);
  const Scalar* zero_state = zeros<Scalar>(runtime, layer.H);
  run_plan(plan, layer, runtime, scratch<Team>(runtime, plan.groups),
           [&](const Part& part) { forward_short_part<Cell>(args, zero_state, part, runtime); });
}

}  // namespace
}  // namespace namernn_fast
