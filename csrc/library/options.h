// The bits of an operator's argument `options`, as defined in namernn_fast/ops.py.
#pragma once

#include "contract.h"
#include "library/check.h"

namespace namernn_fast {

struct Options {
  bool bias;
  bool bidirectional;
  bool batch_first;
  bool packed;
  bool jagged;
  bool batch_invariant;
  bool want_saved;
  bool last_state;
  bool share_prefixes;
  bool int8;         // prepared weights are 8-bit integers, with a scale for each row
  bool projections;  // the layers project h
  bool rate;         // the last weight of each direction is its rate
  bool noise;        // the features of the input are followed by the noise
  Activation activation;
  int64_t terms;  // number of bfloat16 terms per float in products; 0 for products of floats
  int64_t trees;  // minimum number of prefix trees if prefixes are shared
  int64_t per_direction;  // number of weights that each direction of a layer has
};

// Returns the cell with the number that operators take.
inline CellKind cell_of(int64_t cell) {
  check(cell >= 0 && cell < kCells, "cell must be from 0 to ", kCells - 1, ", got ", cell);
  return CellKind(cell);
}

inline Options read_options(int64_t bits, int64_t trees) {
  check(bits >= 0 && bits >> 18 == 0, "options must be bits of namernn_fast.ops, got ", bits);
  check(trees >= 0, "trees must not be negative, got ", trees);
  const auto has = [&](int place) { return (bits >> place & 1) != 0; };
  check(!(has(10) && has(11)), "options must not set both MEDIUM_PRECISION and HIGH_PRECISION");
  check(has(0) + has(14) + has(15) <= 1, "options must not set two nonlinearities");
  const Activation activation = has(0)    ? Activation::relu
                                : has(14) ? Activation::sigmoid
                                : has(15) ? Activation::softplus
                                          : Activation::tanh;
  const int64_t terms = has(12) ? 0 : has(10) ? 1 : has(11) ? 2 : 0;
  const int64_t per_direction = 2 + 2 * has(1) + has(13) + has(16);
  return {has(1),  has(2),  has(3),  has(4),  has(5),     has(6), has(7), has(8),       has(9),
          has(12), has(13), has(16), has(17), activation, terms,  trees,  per_direction};
}

}  // namespace namernn_fast
