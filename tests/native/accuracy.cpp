// Checks the forward and backward kernels against the error budget: the error of a result, measured
// against a layer in higher precision, may be twice the error of a plain loop in the kernel's
// precision, plus one unit in the last place of the largest value.
#include <cstdio>

#include "plain.h"

namespace namernn_fast {
namespace {

// For each storage type: the type that kernels compute in, a type of higher precision, and the
// number of significant bits stored.
template <class Storage>
struct Precision;
template <>
struct Precision<float> {
  using Computed = float;
  using Higher = double;
  static constexpr int bits = 24;
};
template <>
struct Precision<double> {
  using Computed = double;
  using Higher = long double;
  static constexpr int bits = 53;
};
template <>
struct Precision<BFloat16> {
  using Computed = float;
  using Higher = double;
  static constexpr int bits = 8;
};
template <>
struct Precision<Half> {
  using Computed = float;
  using Higher = double;
  static constexpr int bits = 11;
};

// How much of its error budget a result uses, over several problems.
struct Share {
  double ours = 0, plain = 0;  // largest errors of the kernels and of the plain loop
  double largest = 0;          // largest value

  template <class Computed, class Higher>
  void add(const std::vector<double>& found, const std::vector<Computed>& loop,
           const std::vector<Higher>& exact) {
    for (size_t i = 0; i < found.size(); ++i) {
      if (std::isnan(exact[i])) continue;  // padding
      // Comparisons with NaN are false, so `ours` stays NaN once it is NaN.
      const double error = std::fabs(double(found[i] - exact[i]));
      ours = std::isnan(ours) || error <= ours ? ours : error;
      plain = std::max(plain, double(std::fabs(loop[i] - exact[i])));
      largest = std::max(largest, double(std::fabs(exact[i])));
    }
  }
  double of_budget(int bits) const {
    return ours > 0 || std::isnan(ours) ? ours / (2 * plain + std::ldexp(largest, 1 - bits)) : 0;
  }
};

// Adds the errors of one problem to the shares of its results.
template <class Storage>
void add_errors(const KernelsFor<Storage>& kernels, const Problem& p, Random& random, int bits,
                Share (&shares)[kNames]) {
  using Precise = Precision<Storage>;
  const Shape shape(p);
  const Arguments<Storage> arguments(p, shape, random);
  const Results<Storage> found(p, shape, random);
  Plain<typename Precise::Computed> loop(p, shape, arguments, found, bits);
  Plain<typename Precise::Higher> exact(p, shape, arguments, found, 60);
  run(kernels, p, arguments, found, runtime_of(1, p.l2_bytes));
  if (const char* error = found.error()) fail(error);
  const auto& rounded_values = loop.run();
  const auto& exact_values = exact.run();
  for (int i = 0; i < kNames; ++i) {
    shares[i].add(numbers<double>(found[Name(i)]), rounded_values[i], exact_values[i]);
  }
}

template <class Storage>
void check(const TestedCell& cell, const KernelsFor<Storage>& kernels,
           int bits = Precision<Storage>::bits) {
  static const int64_t shapes[][4] = {
      {5, 7, 6, 3}, {16, 48, 5, 1}, {9, 130, 4, 7}, {20, 33, 20, 9}};
  Random random;
  double most = 0;
  unsigned round = 0;
  forced_plan = {1, 1, 0};
  for (const auto& shape : shapes) {
    for (const bool relu : {false, true}) {
      // Skips relu in low precision: rounding may move a state across the kink.
      if (relu && (bits < 24 || !cell.has_nonlinearity)) continue;
      Share shares[kNames];
      for (unsigned options = 0; options < kOptions; ++options) {
        Problem p = problem_of<Storage>(cell, shape, options, bits_of(round++));
        p.relu = relu;
        if (!kernels.backward_panels.pack) p.accumulate_weights = false;
        add_errors(kernels, p, random, bits, shares);
      }
      for (int i = 0; i < kNames; ++i) {
        const double share = shares[i].of_budget(bits);
        most = share <= most ? most : share;
        if (share <= 1) continue;
        std::fprintf(stderr,
                     "%s, %zu bytes, (D, H, T, B) = (%d, %d, %d, %d), %s uses %.2f of its budget: ",
                     cell.name.c_str(), sizeof(Storage), int(shape[0]), int(shape[1]),
                     int(shape[2]), int(shape[3]), names[i], share);
        fail("its error is too large");
      }
    }
  }
  std::printf("%s, %d significant bits: %u problems take %.2f of the error budget at most\n",
              cell.name.c_str(), bits, round, most);
  std::fflush(stdout);
}

}  // namespace

void check_accuracy(const TestedCell& cell, const KernelsOfCell& kernels) {
  check<float>(cell, kernels);
  check<double>(cell, kernels);
  check<BFloat16>(cell, kernels);
  check<Half>(cell, kernels);
}

void check_accuracy(const TestedCell& cell, const KernelsFor<BFloat16>& kernels) {
  check<BFloat16>(cell, kernels);
}

void check_accuracy(const TestedCell& cell, const KernelsFor<float>& kernels, int bits) {
  check<float>(cell, kernels, bits);
}

}  // namespace namernn_fast
