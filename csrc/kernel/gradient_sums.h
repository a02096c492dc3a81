// Accumulates the sums of parameter gradients, keeps the sums accurate over many rows, and adds up
// the sums of several groups.
//
// Every addition to a large sum rounds it, and a parameter's gradient is the sum of one product per
// kChunkRows rows. So in a group with more than 2 * kRowsApart rows, the gradients of about
// kRowsApart rows at a time accumulate in a separate buffer, `apart`. Adding `apart` to the sums
// leaves the rounding error in `apart` for the next addition, as in compensated (Kahan) summation.
#pragma once

#include <type_traits>

#include "kernel/sharing.h"
#include "kernel/time_blocks.h"

namespace namernn_fast {
namespace {

// Returns whether parameter gradients are wanted. Checks grad_weight_hh, because grad_weight_ih may
// be null if it has no elements.
template <class Storage>
inline bool wants_weights(const Backward<Storage>& args) {
  return args.grad_weight_hh != nullptr;
}

// One array per parameter. The elements are in the order in which the products write them.
template <class Scalar>
struct Gradients {
  Scalar* weight_ih;
  Scalar* weight_hh;
  Scalar* bias_ih;
  Scalar* bias_hh;
};

// Number of elements in the sums of each parameter's gradient; 0 for a bias that does not exist,
// and for bias_hh if it has the same gradient as bias_ih.
struct GradientSizes {
  int64_t weight_ih;  // number of elements in the table's gradient if there is a table
  int64_t weight_hh;
  int64_t bias_ih;
  int64_t bias_hh;
};

// The sums of one group's parameter gradients, used only if such gradients are wanted.
template <class Scalar>
struct GradientSums {
  GradientSizes sizes;
  Gradients<Scalar> sums;
  Gradients<Scalar> apart;  // gradients not yet added to `sums`; null if only `sums` is used
  bool accumulate;          // whether to add to what `sums` already contains
};

// Keeps track of where the gradients of the next rows accumulate.
struct Accumulation {
  bool apart = false;  // whether gradients accumulate in GradientSums::apart instead of `sums`
  int64_t rows = 0;    // number of rows since `apart` was last added to `sums`
};

// Splits n elements into `shares` shares of whole vectors. Returns the range of elements in shares
// begin .. end.
template <class Scalar>
inline Columns elements_of(int64_t n, int64_t begin, int64_t end, int64_t shares) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  const int64_t vectors = (n + lanes - 1) / lanes;
  return {vectors * begin / shares * lanes, min64(n, vectors * end / shares * lanes)};
}

// Adds `apart` to `sums` for a range of elements, and leaves the rounding error in `apart`.
template <class Scalar>
inline void add_apart(Scalar* sums, Scalar* apart, const Columns& elements) {
  for_each_vector<Scalar>(elements.last - elements.first, [&](int64_t i, int64_t n) {
    Vec<Scalar> sum = load_upto(sums + elements.first + i, n);
    Vec<Scalar> rest = load_upto(apart + elements.first + i, n);
    add_keeping_error(sum, rest);
    store_upto(sums + elements.first + i, sum, n);
    store_upto(apart + elements.first + i, rest, n);
  });
}

// Adds `apart` to `sums`, for shares begin .. end of every gradient.
template <class Scalar>
inline void add_apart(const GradientSums<Scalar>& gradients, int64_t begin, int64_t end,
                      int64_t shares) {
  const auto elements = [&](int64_t n) { return elements_of<Scalar>(n, begin, end, shares); };
  add_apart(gradients.sums.weight_ih, gradients.apart.weight_ih,
            elements(gradients.sizes.weight_ih));
  add_apart(gradients.sums.weight_hh, gradients.apart.weight_hh,
            elements(gradients.sizes.weight_hh));
  add_apart(gradients.sums.bias_ih, gradients.apart.bias_ih, elements(gradients.sizes.bias_ih));
  add_apart(gradients.sums.bias_hh, gradients.apart.bias_hh, elements(gradients.sizes.bias_hh));
}

// Counts the rows of a time block. About every kRowsApart rows, calls add() to add `apart` to
// `sums`. The first time, only switches the accumulation from `sums` to `apart`.
template <class Scalar, class Add>
inline void after_time_block(const GradientSums<Scalar>& gradients, int64_t rows,
                             Accumulation& accumulation, Add&& add) {
  accumulation.rows += rows;
  if (!gradients.apart.weight_ih || accumulation.rows < kRowsApart) return;
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

// Converts n sums to the type of `result` and stores the converted sums in `result`. If the types
// are the same, does nothing, because the sums then accumulated in `result` itself.
template <class Scalar, class Storage>
inline void deliver(const Scalar* sums, Storage* result, int64_t n) {
  if constexpr (!std::is_same_v<Storage, Scalar>) {
    if (result) convert(sums, result, n);
  }
}

// Prepares the gradient sums of group number `group`, which has `rows` rows. The first group
// accumulates in the memory that will hold the total over all groups.
template <class Products, class Storage, class Scalar = Compute<Storage>>
inline GradientSums<Scalar> gradient_sums(const Backward<Storage>& args, const GradientSizes& sizes,
                                          int64_t group, int64_t rows, const Runtime& runtime) {
  GradientSums<Scalar> gradients{};
  gradients.sizes = sizes;
  const bool in_result_hh = group == 0 && Products::sums_like_gradient;
  const bool in_result_ih = in_result_hh || (group == 0 && has_table(args.layer));
  gradients.sums = {
      accumulator<Scalar>(runtime, in_result_ih ? args.grad_weight_ih : nullptr, sizes.weight_ih),
      accumulator<Scalar>(runtime, in_result_hh ? args.grad_weight_hh : nullptr, sizes.weight_hh),
      accumulator<Scalar>(runtime, group ? nullptr : args.grad_bias_ih, sizes.bias_ih),
      accumulator<Scalar>(runtime, group ? nullptr : args.grad_bias_hh, sizes.bias_hh)};
  gradients.accumulate = args.accumulate_weights && group == 0;
  // One long sequence may leave the other groups without rows. Nothing else sets the sums of a
  // group without rows.
  if (rows == 0 && !gradients.accumulate) {
    std::memset(gradients.sums.weight_ih, 0, sizes.weight_ih * sizeof(Scalar));
    std::memset(gradients.sums.weight_hh, 0, sizes.weight_hh * sizeof(Scalar));
    std::memset(gradients.sums.bias_ih, 0, sizes.bias_ih * sizeof(Scalar));
    std::memset(gradients.sums.bias_hh, 0, sizes.bias_hh * sizeof(Scalar));
  }
  if (rows > 2 * kRowsApart) {
    gradients.apart = {
        zeros<Scalar>(runtime, sizes.weight_ih), zeros<Scalar>(runtime, sizes.weight_hh),
        zeros<Scalar>(runtime, sizes.bias_ih), zeros<Scalar>(runtime, sizes.bias_hh)};
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
