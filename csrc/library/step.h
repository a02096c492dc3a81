// Steps of a stream: a prepared stack in one direction, whose states a step updates in place.
#pragma once

#include "contract.h"
#include "library/options.h"
#include "library/tensors.h"

namespace namernn_fast {

// The arguments of a step, which are not checked yet.
struct Step {
  View prepared;  // from prepare()
  View states;    // [states of the cell, layers, sequences, H], in float for layers in 16 bits
  View frame;     // [n, D], or several steps at once: [T, n, D], with BATCH_FIRST [n, T, D]. Token
                  // ids without the last dimension. The features of a row are adjacent
  View output;    // written: shaped like `frame`, with H features; contiguous
  const int64_t* rows;  // [row_count]: the sequences that the frame is for
  int64_t row_count;    // -1 if the frame is for all sequences
};

// Returns whether the rows of a step can be read and written where they are, and the frame has a
// row for each row of the output.
bool is_simple(const Step& step);

// Runs a step. Checks all arguments first, and updates the states last, so that an error leaves
// them as they were.
void run_step(const Step& step, const Options& options);

}  // namespace namernn_fast
