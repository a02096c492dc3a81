// Decodes the operators' argument `options`, a sum of bits.
#pragma once

#include "contract.h"
#include "library/base/check.h"
#include "processor.h"

namespace namernn_fast {

// The bits have the same names and values as in namernn_fast/ops.py, which explains them.
struct Options {
  int64_t bits;
  int64_t trees;  // minimum number of prefix trees if prefixes are shared
  bool relu = has(1);
  bool bias = has(2);
  bool bidirectional = has(4);
  bool batch_first = has(8);
  bool packed = has(16);
  bool jagged = has(32);
  bool batch_invariant = has(64);
  bool want_saved = has(128);
  bool last_state = has(256);
  bool share_prefixes = has(512);
  bool medium_precision = has(1024);
  bool high_precision = has(2048);
  bool int8 = has(4096);
  bool projections = has(8192);
  bool sigmoid = has(16384);
  bool softplus = has(32768);
  bool states = has(65536);
  bool reset_to = has(131072);
  bool inputs = has(262144);
  bool sums = has(524288);
  bool for_backward = has(1048576);
  bool unknown = bits < 0 || bits >= 2097152;  // whether an undefined bit is set
  Activation activation = relu       ? Activation::relu
                          : sigmoid  ? Activation::sigmoid
                          : softplus ? Activation::softplus
                                     : Activation::tanh;
  // Number of bfloat16 terms that products split each float into; 0 if products use floats.
  int64_t terms = int8 ? 0 : medium_precision ? 1 : high_precision ? 2 : 0;

  bool has(int64_t bit) const { return (bits & bit) != 0; }
};

// Returns the cell for an operator's argument `cell`.
inline const Cell& cell_of(int64_t cell) {
  check(cell >= 0 && cell < kCells, "cell must be between 0 and ", kCells - 1, ", got ", cell);
  return kernels().cells[cell];
}

inline Options read_options(int64_t bits, int64_t trees) {
  const Options options{bits, trees};
  check(!options.unknown, "options must be bits of namernn_fast.ops, got ", bits);
  check(trees >= 0, "trees must not be negative, got ", trees);
  check(!(options.medium_precision && options.high_precision),
        "options must not set both MEDIUM_PRECISION and HIGH_PRECISION");
  check(options.relu + options.sigmoid + options.softplus <= 1,
        "options must not set two nonlinearities");
  return options;
}

}  // namespace namernn_fast
