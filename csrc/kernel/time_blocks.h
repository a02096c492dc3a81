// The stretches of time that the backward pass works through, and the rows of a group in them.
#pragma once

#include "rows.h"

namespace namernn_fast {
namespace {

// Rows of a call whose products are not summed up over time blocks: no time block holds fewer.
constexpr int64_t kOneProductRows = 256;

// The rows of one group's sequences, numbered in the order of time.
struct GroupRows {
  Slice slice;
  const int64_t* start;  // [T + 1], the group's rows before time t; null: all sequences are alive
};

// The number of the group's first row at time t.
inline int64_t first_row(const GroupRows& rows, int64_t t) {
  return rows.start ? rows.start[t] : t * (rows.slice.end - rows.slice.begin);
}

// Times first .. last, whose rows fit in cache together.
struct TimeBlock {
  int64_t first;
  int64_t last;
  bool initial;  // the one where the backward pass begins
};

inline int64_t count_rows(const GroupRows& rows, const TimeBlock& block) {
  return first_row(rows, block.last) - first_row(rows, block.first);
}

// An empty block at the time where the backward pass begins.
template <class Storage>
inline TimeBlock block_before_all(const Layer<Storage>& layer) {
  const int64_t edge = layer.reverse ? 0 : layer.layout.T;
  return {edge, edge, true};
}

// Turns a block into the one that comes next in the backward order, of about `wanted` rows. Returns
// false where no time is left.
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
