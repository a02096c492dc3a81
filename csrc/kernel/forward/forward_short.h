// Runs the forward pass of one short sequence through a small layer. Reads the caller's weights in
// place, and accumulates projection and recurrence in the same vectors. Packing the weights or
// computing the two products separately would make the pass about 10 % slower.
#pragma once

#include "kernel/forward/forward_rows.h"

namespace namernn_fast {
namespace {

// Returns whether to run a layer with forward_short(). The layer must be small and supported, with
// D and H multiples of the vector length, and the batch must be one short sequence.
template <class Scalar>
inline bool is_short(const Layer<Scalar>& layer) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  constexpr int64_t most_steps = 16;
  // With more features, reading fewer rows of the weights at once is faster.
  constexpr int64_t most_features = 512;
  const int64_t T = layer.layout.T;
  const Cell& cell = *layer.cell;
  return are_sums_in_output(layer) && cell.states == 1 && !cell.kept && !cell.inputs && !cell.own &&
         layer.layout.B == 1 && !layer.layout.origin && !layer.layout.tree &&
         !layer.batch_invariant && !layer.resets.at && !layer.panels && T <= most_steps &&
         layer.D + layer.H <= most_features && T * layer.D <= 4 * (layer.D + layer.H) &&
         layer.D % lanes == 0 && layer.H % lanes == 0;
}

// Adds W[r, K] x[K] to acc[r], lane by lane. W has as many rows as a vector has lanes.
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
template <class Scalar>
inline void forward_short_part(const Forward<Scalar>& args, const Scalar* zeros, const Part& part,
                               const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  const CellCode<Scalar>& code = *layer.cell;
  const auto& parameters = layer.parameters;
  const Scalar *bias_ih = parameters[kBiasIh], *bias_hh = parameters[kBiasHh];
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
      accumulate_rows(parameters[kWeightIh] + j * layer.D, layer.D, x, acc);
      accumulate_rows(parameters[kWeightHh] + j * layer.H, layer.H, h, acc);
      Vec<Scalar> z = sum_lanes<Scalar>(acc);
      if (looked_up) z += load(looked_up + j);
      if (bias_ih) z += load(bias_ih + j);
      if (bias_hh) z += load(bias_hh + j);
      store(out + j, z);
    }
    Scalar* row = out + first;
    StateRows<Scalar> units{};
    units.range = {0, 1, 0, last - first};
    units.H = layer.H;
    units.activation = layer.activation;
    units.program = layer.cell->program;
    units.sums.data = units.states[0].data = row;
    code.states_of(units);
    h = out;
    if (part.team && s + 1 < T) barrier(*part.team, runtime);
  }
  std::memcpy(args.last[0] + first, h + first, (last - first) * sizeof(Scalar));
}

template <class Scalar>
inline void forward_short(Forward<Scalar> args, const Runtime& runtime) {
  const Layer<Scalar>& layer = args.layer;
  // If the caller wants no output, writes the output to scratch memory. The last state is then
  // bit-identical with and without an output.
  if (!args.output.data) {
    args.output = {scratch<Scalar>(runtime, layer.layout.T * layer.H), layer.H, layer.H};
  }
  const Plan plan = forward_plan(layer, runtime);
  const Scalar* zero_state = zeros<Scalar>(runtime, layer.H);
  run_plan(plan, layer, runtime, scratch<Team>(runtime, plan.groups),
           [&](const Part& part) { forward_short_part(args, zero_state, part, runtime); });
}

}  // namespace
}  // namespace namernn_fast
