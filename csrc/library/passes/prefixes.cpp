#include "library/passes/prefixes.h"

#include <algorithm>

#include "rows.h"

namespace namernn_fast {
namespace {

constexpr int64_t kTreeRows = 1024;  // approximate maximum number of rows per tree
constexpr int64_t kThinRows = 4;     // steps with fewer rows take as long as steps with this many
constexpr double kGathering = 1.06;  // relative time per row if previous states are gathered
constexpr double kWorth = 0.95;      // trees must take less than this fraction of the unshared time

// Returns a worker's time for one step of this many rows, in units of the time for one row.
double cost_of(double rows) { return rows > 0 ? std::max(rows, double(kThinRows)) : 0; }

// Returns the number of bits needed for numbers from 0 to n.
int bits_of(int64_t n) {
  int bits = 0;
  while (bits < 63 && n >> bits) ++bits;
  return bits;
}

}  // namespace

PrefixTrees::PrefixTrees(const Batch& batch, const Tensor& ids, int64_t V, int64_t least) {
  least = std::clamp<int64_t>(least, 1, batch.layout.B);
  read_sequences(batch, ids);
  sort(V);
  cut(batch.layout.T, least);
  double plain = 0;  // time per worker if `least` workers divide the sequences, without trees
  for (int64_t t = 0; t < batch.layout.T; ++t) {
    plain += cost_of(double(count_at(batch.layout, t)) / double(least));
  }
  const double workers = double(std::min(least, count()));
  worthwhile_ = kGathering * cost_ / workers < kWorth * plain;
}

// Copies the ids so that each sequence's ids are contiguous.
void PrefixTrees::read_sequences(const Batch& batch, const Tensor& ids) {
  const SequenceLayout& layout = batch.layout;
  const RowStrides<const int64_t> rows =
      rows_of<const int64_t>(batch, ids, const_data<int64_t>(ids), 0);
  ids_.resize(size_t(layout.N));
  sequences_.resize(size_t(layout.B));
  int64_t* copy = ids_.data();
  int64_t length = layout.T;  // does not grow with b: the longest sequence is first
  for (int64_t b = 0; b < layout.B; ++b) {
    while (count_at(layout, length - 1) <= b) --length;
    sequences_[size_t(b)] = {copy, length, place_of(layout, b), 0};
    for (int64_t t = 0; t < length; ++t) *copy++ = *row_at(rows, layout, t, b);
  }
}

// Sorts the sequences lexicographically, and counts the leading ids that each sequence shares
// with its predecessor.
void PrefixTrees::sort(int64_t V) {
  const int bits = std::max(1, bits_of(V));  // bits per digit; a digit is id + 1, or 0 past the end
  const int64_t in_key = 63 / bits;
  for (Sequence& sequence : sequences_) {
    for (int64_t t = 0; t < in_key; ++t) {
      const uint64_t digit = t < sequence.length ? uint64_t(sequence.ids[t]) + 1 : 0;
      sequence.key = sequence.key << bits | digit;
    }
  }
  std::sort(sequences_.begin(), sequences_.end(), [&](const Sequence& a, const Sequence& b) {
    if (a.key != b.key) return a.key < b.key;
    const int64_t known = std::min({in_key, a.length, b.length});
    const int order = [&] {
      const auto [left, right] =
          std::mismatch(a.ids + known, a.ids + std::min(a.length, b.length), b.ids + known);
      if (left != a.ids + std::min(a.length, b.length)) return *left < *right ? -1 : 1;
      return a.length < b.length ? -1 : a.length > b.length ? 1 : 0;
    }();
    return order ? order < 0 : a.number < b.number;
  });
  shared_.resize(sequences_.size());
  for (size_t i = 1; i < sequences_.size(); ++i) {
    const Sequence& a = sequences_[i - 1];
    const Sequence& b = sequences_[i];
    const int64_t* const end = a.ids + std::min(a.length, b.length);
    shared_[i] = std::mismatch(a.ids, end, b.ids).first - a.ids;
  }
}

// Splits the sorted sequences into trees of roughly equal size, and adds up the cost of the trees.
void PrefixTrees::cut(int64_t steps, int64_t least) {
  int64_t all = 0;  // number of rows if all sequences formed a single tree
  for (size_t i = 0; i < sequences_.size(); ++i) all += sequences_[i].length - shared_[i];
  const int64_t trees = (all + kTreeRows * least - 1) / (kTreeRows * least) * least;
  std::vector<int64_t> count(static_cast<size_t>(steps));  // the current tree's rows at each time
  const auto finish_tree = [&] {
    for (int64_t& rows : count) {
      cost_ += cost_of(double(rows));
      rows = 0;
    }
  };
  first_sequence_.push_back(0);
  first_row_.push_back(0);
  int64_t passed = 0;
  int64_t rows = 0;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const int64_t added = sequences_[i].length - shared_[i];
    if (added > 0 && passed * trees >= all * int64_t(first_row_.size())) {
      finish_tree();
      first_sequence_.push_back(int64_t(i));
      first_row_.push_back(rows);
      shared_[i] = 0;  // the new tree computes the prefix again
    }
    passed += added;
    rows += sequences_[i].length - shared_[i];
    for (int64_t t = shared_[i]; t < sequences_[i].length; ++t) ++count[size_t(t)];
  }
  finish_tree();
  first_sequence_.push_back(int64_t(sequences_.size()));
  first_row_.push_back(rows);
}

int64_t PrefixTrees::most_rows() const {
  int64_t most = 0;
  for (int64_t i = 0; i < count(); ++i) most = std::max(most, rows(i));
  return most;
}

void PrefixTrees::build(int64_t i, Tree& tree) const {
  const size_t first = size_t(first_sequence_[size_t(i)]);
  const size_t last = size_t(first_sequence_[size_t(i) + 1]);
  const size_t N = size_t(rows(i));
  // A sequence adds one row for each id that it does not share with its predecessor.
  tree.count.clear();
  for (size_t s = first; s < last; ++s) {
    const int64_t length = sequences_[s].length;
    if (int64_t(tree.count.size()) < length) tree.count.resize(size_t(length), 0);
    for (int64_t t = shared_[s]; t < length; ++t) ++tree.count[size_t(t)];
  }
  const size_t T = tree.count.size();
  tree.start.assign(T, 0);
  for (size_t t = 1; t < T; ++t) tree.start[t] = tree.start[t - 1] + tree.count[t - 1];

  // Because the sequences are sorted, the current sequence's row at t is the last row added at t.
  std::vector<int64_t> newest(T, -1);
  std::vector<int64_t> end_row(last - first);
  tree.ids.resize(N);
  tree.parent.resize(N);
  tree.end_start.assign(N + 1, 0);
  for (size_t s = first; s < last; ++s) {
    const Sequence& sequence = sequences_[s];
    for (size_t t = size_t(shared_[s]); t < size_t(sequence.length); ++t) {
      const size_t row = size_t(tree.start[t] + ++newest[t]);
      tree.ids[row] = sequence.ids[t];
      tree.parent[row] = t ? newest[t - 1] : 0;
    }
    const size_t end = size_t(sequence.length) - 1;
    end_row[s - first] = tree.start[end] + newest[end];
    ++tree.end_start[size_t(end_row[s - first]) + 1];
  }
  for (size_t row = 0; row < N; ++row) tree.end_start[row + 1] += tree.end_start[row];
  std::vector<int64_t> place(tree.end_start.begin(), tree.end_start.end() - 1);
  tree.end_sequence.resize(last - first);
  for (size_t s = first; s < last; ++s) {
    tree.end_sequence[size_t(place[size_t(end_row[s - first])]++)] = sequences_[s].number;
  }

  tree.links = {tree.parent.data(), tree.end_start.data(), tree.end_sequence.data()};
  tree.layout = SequenceLayout{};
  tree.layout.T = int64_t(T);
  tree.layout.B = *std::max_element(tree.count.begin(), tree.count.end());
  tree.layout.N = int64_t(N);
  tree.layout.count = tree.count.data();
  tree.layout.start = tree.start.data();
  tree.layout.tree = &tree.links;
}

}  // namespace namernn_fast
