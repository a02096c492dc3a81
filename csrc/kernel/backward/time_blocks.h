// Defines the time blocks of the backward pass, and the rows of a group in a time block.
#pragma once

#include "rows.h"

namespace namernn_fast {
namespace {

// Every time block has space for at least this many rows. So a call with at most this many rows
// runs as a single time block, and each weight gradient is one product instead of a sum over time
// blocks.
constexpr int64_t kOneProductRows = 256;

// The rows of one group's sequences, numbered in time order.
struct GroupRows {
  Slice slice;
  // [T + 1]: the group's number of rows before time t; null if all sequences are always alive.
  const int64_t* start;
};

// Returns the index of the group's first row at time t.
inline int64_t first_row(const GroupRows& rows, int64_t t) {
  return rows.start ? rows.start[t] : t * (rows.slice.end - rows.slice.begin);
}

// A range of times, first .. last, whose rows fit in cache together.
struct TimeBlock {
  int64_t first;
  int64_t last;
  bool initial;  // whether the backward pass starts in this time block
};

inline int64_t count_rows(const GroupRows& rows, const TimeBlock& block) {
  return first_row(rows, block.last) - first_row(rows, block.first);
}

// Returns the empty time block from which the backward pass starts: before the first time if the
// layer runs in reverse, after the last time otherwise.
template <class Storage>
inline TimeBlock block_before_first(const Layer<Storage>& layer) {
  const int64_t edge = layer.reverse ? 0 : layer.layout.T;
  return {edge, edge, true};
}

// Advances `block` to the next time block in backward order, with at least `wanted` rows if enough
// rows are left. Returns false if no steps are left.
template <class Storage>
inline bool next_block(const Layer<Storage>& layer, const GroupRows& rows, int64_t wanted,
                       TimeBlock& block) {
  const int64_t T = layer.layout.T;
  block.initial = block.first == block.last;
  if (layer.reverse) {
    block.first = block.last;
    while (block.last < T && count_rows(rows, block) < wanted) ++block.last;
  } else {
    block.last = block.first;
    while (block.first > 0 && count_rows(rows, block) < wanted) --block.first;
  }
  return block.first < block.last;
}

}  // namespace
}  // namespace namernn_fast
