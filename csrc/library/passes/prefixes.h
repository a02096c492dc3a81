// Prefix trees. If several sequences of token ids share a prefix, it is computed only once.
//
// Sorting puts sequences with a common prefix next to each other. The sorted sequences are then
// split into trees of roughly equal size. Trees do not share rows, so each thread can take whole
// trees. The trees depend only on the arguments: a backward pass that gets the arguments of its
// forward pass rebuilds the same trees, even if the number of threads has changed since.
#pragma once

#include <utility>
#include <vector>

#include "contract.h"
#include "library/arguments/batch.h"

namespace namernn_fast {

// One tree and the layout of its rows. The pointers in `layout` and `links` point into this object,
// so it must not be copied or moved.
struct Tree {
  Tree() = default;
  Tree(const Tree&) = delete;
  Tree& operator=(const Tree&) = delete;

  SequenceLayout layout;
  PrefixTree links;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  std::vector<int64_t> ids;  // [N]: the token id of each row
  std::vector<int64_t> parent;
  std::vector<int64_t> end_start;
  std::vector<int64_t> end_sequence;
};

class PrefixTrees {
 public:
  // Splits the sequences into at least `least` trees if possible. `ids` must have passed
  // check_ids() with the same V.
  PrefixTrees(const Batch& batch, const Tensor& ids, int64_t V, int64_t least);

  // Returns true if `least` workers are estimated to be faster with these trees than without
  // sharing.
  bool are_worthwhile() const { return worthwhile_; }

  int64_t count() const { return int64_t(first_sequence_.size()) - 1; }
  // Returns the total number of rows in the trees before tree i.
  int64_t first_row(int64_t i) const { return first_row_[size_t(i)]; }
  int64_t rows(int64_t i) const { return first_row(i + 1) - first_row(i); }
  // Returns the number of rows in the largest tree.
  int64_t most_rows() const;

  void build(int64_t i, Tree& tree) const;

 private:
  struct Sequence {
    const int64_t* ids;
    int64_t length;
    int64_t number;  // the caller's index of the sequence
    uint64_t key;    // the first ids, packed so that keys compare like sequences
  };

  void read_sequences(const Batch& batch, const Tensor& ids);
  void sort(int64_t V);
  void cut(int64_t steps, int64_t least);

  std::vector<int64_t> ids_;
  std::vector<Sequence> sequences_;  // sorted by ids
  std::vector<int64_t> shared_;      // number of ids shared with the previous sequence of the tree
  std::vector<int64_t> first_sequence_;  // first sequence of each tree, then sequences_.size()
  std::vector<int64_t> first_row_;       // first row of each tree, then the number of rows
  double cost_ = 0;                      // cost of all trees, in units of the time for one row
  bool worthwhile_ = false;
};

}  // namespace namernn_fast
