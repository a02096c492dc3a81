// Sums of parameter gradients: where they gather, how they stay accurate over many rows, how those
// of several groups are added up.
//
// Each addition to a large sum rounds it, and a parameter's gradient is the sum of one product for
// every kChunkRows rows. So the gradients of kRowsApart rows gather apart from the sums, in groups
// that have more than twice as many rows; when they are added to the sums, what rounding takes from
// them stays there and is added the next time.
#pragma once

#include <type_traits>

#include "kernel/sharing.h"
#include "kernel/time_blocks.h"

namespace namernn_fast {
namespace {

// One array for each parameter, whose sums are in the order that the products give them.
template <class Scalar>
struct Gradients {
  Scalar* weight_ih;
  Scalar* weight_hh;
  Scalar* bias;
};

// Elements of the sums of each parameter's gradient; no bias: zero.
struct GradientSizes {
  int64_t weight_ih;  // or of the table
  int64_t weight_hh;
  int64_t bias;
};

// The gradient sums of one group, where parameter gradients are wanted.
template <class Scalar>
struct GradientSums {
  GradientSizes sizes;
  Gradients<Scalar> sums;
  Gradients<Scalar> apart;  // not in the sums yet; null: nothing gathers apart
  bool accumulate;          // to what the sums hold from before
};

// Where the gradients of the next rows gather.
struct Gathering {
  bool apart = false;
  int64_t rows = 0;  // since they were last added to the sums
};

// A share begin .. end of n elements, in whole vectors.
template <class Scalar>
inline Columns elements_of(int64_t n, int64_t begin, int64_t end, int64_t shares) {
  constexpr int64_t lanes = Simd<Scalar>::lanes;
  const int64_t vectors = (n + lanes - 1) / lanes;
  return {vectors * begin / shares * lanes, min64(n, vectors * end / shares * lanes)};
}

// sums += apart, and leaves in `apart` what rounding lost.
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

// Adds what gathered apart, for the shares begin .. end of every gradient.
template <class Scalar>
inline void add_apart(const GradientSums<Scalar>& own, int64_t begin, int64_t end, int64_t shares) {
  const auto elements = [&](int64_t n) { return elements_of<Scalar>(n, begin, end, shares); };
  add_apart(own.sums.weight_ih, own.apart.weight_ih, elements(own.sizes.weight_ih));
  add_apart(own.sums.weight_hh, own.apart.weight_hh, elements(own.sizes.weight_hh));
  if (own.sizes.bias) add_apart(own.sums.bias, own.apart.bias, elements(own.sizes.bias));
}

// Counts the rows of a time block, and calls `add` where enough have gathered apart.
template <class Scalar, class Add>
inline void gather(const GradientSums<Scalar>& own, int64_t rows, Gathering& gathering, Add&& add) {
  gathering.rows += rows;
  if (!own.apart.weight_ih || gathering.rows < kRowsApart) return;
  if (gathering.apart) add();
  gathering = {true, 0};
}

// Where sums of n elements gather: in `result` itself, or in scratch memory where the result is
// stored in another type, or is null.
template <class Scalar, class Storage>
inline Scalar* gathering_place(const Runtime& runtime, Storage* result, int64_t n) {
  if constexpr (std::is_same_v<Storage, Scalar>) {
    if (result) return result;
  }
  return scratch<Scalar>(runtime, n);
}

// Converts sums to the type of the result, where they did not gather in the result itself.
template <class Scalar, class Storage>
inline void deliver(const Scalar* sums, Storage* result, int64_t n) {
  if constexpr (!std::is_same_v<Storage, Scalar>) {
    if (result) convert(sums, result, n);
  }
}

// Prepares the gradient sums of one of the groups, which has so many rows. The first group gathers
// where the sum over all groups will be.
template <class Storage, class Scalar = Compute<Storage>>
inline GradientSums<Scalar> gradient_sums(const Backward<Storage>& args, const GradientSizes& sizes,
                                          int64_t group, int64_t rows, const Runtime& runtime) {
  GradientSums<Scalar> own{};
  own.sizes = sizes;
  const int64_t H = args.layer.H;
  own.sums = {
      gathering_place<Scalar>(runtime, group ? nullptr : args.grad_weight_ih, sizes.weight_ih),
      gathering_place<Scalar>(runtime, group ? nullptr : args.grad_weight_hh, sizes.weight_hh),
      gathering_place<Scalar>(runtime, group ? nullptr : args.grad_bias, H)};
  own.accumulate = args.accumulate_weights && group == 0;
  if (rows == 0 && !own.accumulate) {  // a long sequence may leave other groups nothing
    std::memset(own.sums.weight_ih, 0, sizes.weight_ih * sizeof(Scalar));
    std::memset(own.sums.weight_hh, 0, sizes.weight_hh * sizeof(Scalar));
    std::memset(own.sums.bias, 0, H * sizeof(Scalar));
  }
  if (rows > 2 * kRowsApart) {
    own.apart = {zeros<Scalar>(runtime, sizes.weight_ih), zeros<Scalar>(runtime, sizes.weight_hh),
                 zeros<Scalar>(runtime, H)};
  }
  return own;
}

// Adds up one gradient of n elements over all groups, in the place of the first group's, always in
// the order of the groups. `sums(g)` is the gradient of group g.
template <class Scalar, class Sums>
inline void add_up(int64_t groups, int64_t n, const Runtime& runtime, Sums&& sums) {
  const double cost = kAddingCost * double(n) * double(groups - 1);
  const int64_t workers = choose_workers(cost, runtime.machine);
  run_parallel(runtime, workers, [&](int64_t begin, int64_t end) {
    const Columns own = elements_of<Scalar>(n, begin, end, workers);
    for_each_vector<Scalar>(own.last - own.first, [&](int64_t i, int64_t m) {
      const auto part = [&](int64_t g) { return sums(g) + own.first + i; };
      Vec<Scalar> sum = load_upto(part(0), m);
      for (int64_t g = 1; g < groups; ++g) sum += load_upto(part(g), m);
      store_upto(part(0), sum, m);
    });
  });
}

}  // namespace
}  // namespace namernn_fast
