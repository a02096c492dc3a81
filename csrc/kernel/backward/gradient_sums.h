// Accumulates the sums of parameter gradients, keeps the sums accurate over many rows, and adds up
// the sums of several groups.
//
// A parameter's gradient is the sum of one product per kChunkRows rows, and each addition rounds
// the sum. So in a group with more than 2 * kRowsApart rows, the gradients of about kRowsApart rows
// at a time accumulate in a separate buffer, `apart`. Adding `apart` to the sums leaves the
// rounding error in `apart` for the next addition, as in compensated (Kahan) summation.
#pragma once

#include <type_traits>

#include "kernel/backward/time_blocks.h"
#include "kernel/threads/sharing.h"

namespace namernn_fast {
namespace {

// Returns true if the gradient is a sum over rows (biases, own parameters and tables), not a matrix
// product.
template <class Storage>
inline bool is_sum_of_rows(const Layer<Storage>& layer, int parameter) {
  return is_vector(parameter) || (parameter == kWeightIh && has_table(layer));
}

// The sums of one group's parameter gradients, used only if such gradients are wanted.
template <class Scalar>
struct GradientSums {
  // Number of elements in `sums` for each parameter. 0 if the parameter does not exist, or if it is
  // bias_hh and has the same gradient as bias_ih. With a table, the table's gradient replaces the
  // gradient of weight_ih.
  int64_t sizes[kParameters];
  Scalar* sums[kParameters];   // the elements are in the order in which the products write them
  Scalar* apart[kParameters];  // gradients not yet added to `sums`; null if only `sums` is used
  bool accumulate;             // whether to add to the gradients already in `sums`
};

// Tracks which buffer accumulates the gradients of the next rows.
struct Accumulation {
  bool apart = false;  // whether gradients accumulate in GradientSums::apart instead of `sums`
  int64_t rows = 0;    // number of rows since `apart` was last added to `sums`
};

// Splits n elements into `shares` shares, each of whole vectors. Returns the elements of shares
// begin .. end.
template <class Scalar>
inline Columns elements_of(int64_t n, int64_t begin, int64_t end, int64_t shares) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  const int64_t vectors = (n + lanes - 1) / lanes;
  return {vectors * begin / shares * lanes, min64(n, vectors * end / shares * lanes)};
}

// Adds n elements of `addends` to `sums`. Afterwards `addends` holds the rounding errors.
template <class Scalar>
inline void add_keeping_errors(Scalar* addends, int64_t n, Scalar* sums) {
  for_each_vector<Scalar>(n, [=](int64_t i, int64_t lanes) {
    Vec<Scalar> sum = load_upto(sums + i, lanes), rest = load_upto(addends + i, lanes);
    add_keeping_error(sum, rest);
    store_upto(sums + i, sum, lanes);
    store_upto(addends + i, rest, lanes);
  });
}

// Adds `apart` to `sums` for shares begin .. end of every gradient. Afterwards `apart` holds the
// rounding errors.
template <class Scalar>
inline void add_apart(const GradientSums<Scalar>& gradients, int64_t begin, int64_t end,
                      int64_t shares) {
  for (int p = 0; p < kParameters; ++p) {
    const auto [first, last] = elements_of<Scalar>(gradients.sizes[p], begin, end, shares);
    add_keeping_errors(gradients.apart[p] + first, last - first, gradients.sums[p] + first);
  }
}

// Counts a time block's rows. Once kRowsApart rows have accumulated, switches accumulation from
// `sums` to `apart` or, if already switched, calls add() to add `apart` to `sums`.
template <class Scalar, class Add>
inline void after_time_block(const GradientSums<Scalar>& gradients, int64_t rows,
                             Accumulation& accumulation, Add&& add) {
  accumulation.rows += rows;
  if (!gradients.apart[kWeightIh] || accumulation.rows < kRowsApart) return;
  if (accumulation.apart) add();
  accumulation = {true, 0};
}

// Returns the memory where n sums accumulate: `result` itself, or scratch memory if `result` is
// null or has another type.
template <class Scalar, class Storage>
inline Scalar* accumulator(const Runtime& runtime, Storage* result, int64_t n) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    if (result) return result;
  }
  return scratch<Scalar>(runtime, n);
}

// Converts n sums to the type of `result` and stores the converted sums in `result`. No-op if the
// types are the same, because the sums then accumulated in `result` itself.
template <class Scalar, class Storage>
inline void deliver(const Scalar* sums, Storage* result, int64_t n) {
  if constexpr (!std::is_same_v<Storage, Scalar>) {
    if (result) convert(sums, result, n);
  }
}

// Prepares the gradient sums of the group with index `group`, which has `rows` rows. The first
// group accumulates in the memory that will hold the total over all groups.
template <class Products, class Storage, class Scalar = Compute<Storage>>
inline GradientSums<Scalar> gradient_sums(const Backward<Storage>& args,
                                          const int64_t (&sizes)[kParameters], int64_t group,
                                          int64_t rows, const Runtime& runtime) {
  GradientSums<Scalar> gradients{};
  gradients.accumulate = args.accumulate_weights && group == 0;
  for (int p = 0; p < kParameters; ++p) {
    const bool sums_rows = is_sum_of_rows(args.layer, p);
    const bool in_result = group == 0 && (Products::sums_like_gradient || sums_rows);
    gradients.sizes[p] = sizes[p];
    gradients.sums[p] = accumulator<Scalar>(runtime, in_result ? args.grads[p] : nullptr, sizes[p]);
    // A group may have no rows if a sequence in another group is very long. Nothing else
    // initializes the sums of such a group.
    if (rows == 0 && !gradients.accumulate) fill_zeros(gradients.sums[p], sizes[p]);
    if (rows > 2 * kRowsApart) gradients.apart[p] = zeros<Scalar>(runtime, sizes[p]);
  }
  return gradients;
}

// Adds up one gradient of n elements over all groups, always in group order, and stores the total
// in the first group's gradient. `sums(g)` returns the gradient of group g.
template <class Scalar, class Sums>
inline void add_up(int64_t groups, int64_t n, const Runtime& runtime, Sums&& sums) {
  const double cost = kAddingCost * double(n) * double(groups - 1);
  const int64_t workers = choose_workers(cost, runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    const Columns elements = elements_of<Scalar>(n, begin, end, workers);
    for_each_vector<Scalar>(elements.last - elements.first, [&](int64_t i, int64_t m) {
      const auto group_sum = [&](int64_t g) { return sums(g) + elements.first + i; };
      Vec<Scalar> sum = load_upto(group_sum(0), m);
      for (int64_t g = 1; g < groups; ++g) sum += load_upto(group_sum(g), m);
      store_upto(group_sum(0), sum, m);
    });
  });
}

}  // namespace
}  // namespace namernn_fast
