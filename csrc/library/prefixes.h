// Prefix trees: sequences of token ids that begin alike, computed once as far as they do.
//
// The sequences are sorted, so that those that begin alike are neighbours, and cut into trees of
// about as many rows each, which have no rows in common: threads share out whole trees. How the
// trees are made depends on the arguments alone, so that a backward pass with the options of its
// forward pass finds the same trees again, whatever the number of threads is by then.
#pragma once

#include <utility>
#include <vector>

#include "contract.h"
#include "library/batch.h"

namespace namernn_fast {

// One tree, with the layout of its rows. The pointers of `layout` and `links` lead into the
// vectors, which a move leaves where they are.
struct Tree {
  Tree() = default;
  Tree(const Tree&) = delete;
  Tree& operator=(const Tree&) = delete;

  SequenceLayout layout;
  PrefixTree links;
  std::vector<int64_t> count;
  std::vector<int64_t> start;
  std::vector<int64_t> ids;  // [N], the token of each row
  std::vector<int64_t> parent;
  std::vector<int64_t> end_start;
  std::vector<int64_t> end_sequence;
};

class PrefixTrees {
 public:
  // At least `least` trees, if there are as many sequences. `ids` must have passed check_ids() with
  // the same V.
  PrefixTrees(const Batch& batch, const Tensor& ids, int64_t V, int64_t least);

  // Whether so many workers as trees were asked for take less time over the trees than over the
  // rows without trees.
  bool are_worthwhile() const { return worthwhile_; }

  int64_t count() const { return int64_t(first_sequence_.size()) - 1; }
  // The number of rows in all trees before the i-th.
  int64_t first_row(int64_t i) const { return first_row_[size_t(i)]; }
  int64_t rows(int64_t i) const { return first_row(i + 1) - first_row(i); }
  // The rows of the largest tree.
  int64_t most_rows() const;

  void build(int64_t i, Tree& tree) const;

 private:
  struct Sequence {
    const int64_t* ids;
    int64_t length;
    int64_t number;  // the caller's
    uint64_t key;    // the first ids, in the order of the sequences
  };

  void read_sequences(const Batch& batch, const Tensor& ids);
  void sort(int64_t V);
  void cut(int64_t steps, int64_t least);

  std::vector<int64_t> ids_;
  std::vector<Sequence> sequences_;  // sorted, as `shared_` and the cuts are
  std::vector<int64_t> shared_;      // how many ids a sequence has in common with the one before
  std::vector<int64_t> first_sequence_;  // of each tree, and the number of sequences
  std::vector<int64_t> first_row_;       // of each tree, and the number of rows
  double cost_ = 0;                      // of all trees, in rows
  bool worthwhile_ = false;
};

}  // namespace namernn_fast
