// The bits of an operator's argument `options`, as defined in namernn_fast/ops.py.
#pragma once

#include "contract.h"
#include "library/base/check.h"
#include "processor.h"

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
  bool states;       // which tensors come before the weights
  bool reset_to;
  bool inputs;
  Activation activation;
  int64_t terms;  // number of bfloat16 terms per float in products; 0 for products of floats
  int64_t trees;  // minimum number of prefix trees if prefixes are shared
};

// Returns the cell with the number that operators take.
inline const Cell& cell_of(int64_t cell) {
  check(cell >= 0 && cell < kCells, "cell must be from 0 to ", kCells - 1, ", got ", cell);
  return kernels().cells[cell];
}

inline Options read_options(int64_t bits, int64_t trees) {
  check(bits >= 0 && bits >> 19 == 0, "options must be bits of namernn_fast.ops, got ", bits);
  check(trees >= 0, "trees must not be negative, got ", trees);
  const auto has = [&](int place) { return (bits >> place & 1) != 0; };
  check(!(has(10) && has(11)), "options must not set both MEDIUM_PRECISION and HIGH_PRECISION");
  check(has(0) + has(14) + has(15) <= 1, "options must not set two nonlinearities");
  const Activation activation = has(0)    ? Activation::relu
                                : has(14) ? Activation::sigmoid
                                : has(15) ? Activation::softplus
                                          : Activation::tanh;
  const int64_t terms = has(12) ? 0 : has(10) ? 1 : has(11) ? 2 : 0;
  Options options{};
  options.bias = has(1);
  options.bidirectional = has(2);
  options.batch_first = has(3);
  options.packed = has(4);
  options.jagged = has(5);
  options.batch_invariant = has(6);
  options.want_saved = has(7);
  options.last_state = has(8);
  options.share_prefixes = has(9);
  options.int8 = has(12);
  options.projections = has(13);
  options.states = has(16);
  options.reset_to = has(17);
  options.inputs = has(18);
  options.activation = activation;
  options.terms = terms;
  options.trees = trees;
  return options;
}

}  // namespace namernn_fast
