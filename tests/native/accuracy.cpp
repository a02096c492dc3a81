// Checks the forward and backward kernels against an error budget. Errors are measured against a
// layer in higher precision. A kernel's error may be at most twice the error of a plain loop in the
// kernel's precision, plus one unit in the last place of the largest value. Also checks gradients
// that become subnormal.
#include <algorithm>
#include <cstdio>

#include "plain.h"

namespace namernn_fast {
namespace {

// Measures the fraction of its error budget that a result uses over several problems.
struct Share {
  double ours = 0, plain = 0;  // largest errors of the kernels and of the plain loop
  double largest = 0;          // largest value

  template <class Number, class Precise>
  void add(const std::vector<double>& found, const std::vector<Number>& loop,
           const std::vector<Precise>& exact) {
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

// Adds one problem's errors to `shares`, which has one element per result.
template <class Storage>
void add_errors(const KernelsFor<Storage>& kernels, const Problem& p, Random& random, int bits,
                Share (&shares)[kNames]) {
  const Shape shape(p);
  const Arguments<Storage> arguments(p, shape, random);
  const Results<Storage> found(p, shape, random);
  Plain<Computed<Storage>> loop(p, shape, arguments, found, bits);
  Plain<Higher<Storage>> exact(p, shape, arguments, found, 60);
  run(kernels, p, arguments, found, runtime_of(1, p.l2_bytes));
  if (const char* error = found.error()) fail(error);
  const auto& rounded_values = loop.run();
  const auto& exact_values = exact.run();
  for (int i = 0; i < kNames; ++i) {
    shares[i].add(numbers<double>(found[Name(i)]), rounded_values[i], exact_values[i]);
  }
}

template <class Storage>
void check_budget(const TestedCell& cell, const KernelsFor<Storage>& kernels,
                  int bits = kBits<Storage>) {
  static const int64_t shapes[][4] = {
      {5, 7, 6, 3}, {16, 48, 5, 1}, {9, 130, 4, 7}, {20, 33, 20, 9}};
  Random random;
  double most = 0;
  unsigned round = 0;
  forced_plan = {1, 1, 0};
  for (const auto& shape : shapes) {
    for (const bool relu : {false, true}) {
      // Skips relu in low precision: rounding may change the sign of relu's argument.
      if (relu && (bits < 24 || cell.activations == 1)) continue;
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
                     cell.title.c_str(), sizeof(Storage), int(shape[0]), int(shape[1]),
                     int(shape[2]), int(shape[3]), names[i], share);
        fail("its error is too large");
      }
    }
  }
  std::printf("%s, %d significant bits: %u problems take %.2f of the error budget at most\n",
              cell.title.c_str(), bits, round, most);
  std::fflush(stdout);
}

template <class Storage>
Storage power_of_two(int exponent) {
  return Storage(std::ldexp(1.0, exponent));
}
template <>
BFloat16 power_of_two<BFloat16>(int exponent) {
  return {uint16_t((exponent + 127) << 7)};
}

// Over many steps, gradients become subnormal, and the kernels treat subnormal numbers as zeros.
// Checks how much accuracy is lost. Each term of a sum may lose up to the smallest normal number.
// This loss may also change the rounding of the result, and of one value that the result is
// computed from. Gradients far above the smallest normal number must lose nothing.
template <class Storage>
void check_fading(const TestedCell& cell, const KernelsFor<Storage>& kernels,
                  int bits = kBits<Storage>) {
  static const int64_t shape_of_problem[4] = {3, 64, 600, 2};
  Problem p = problem_of<Storage>(cell, shape_of_problem, 0, 0);
  p.grad_last[0] = p.want_input = p.want_output = true;
  Random random;
  const Shape shape(p);
  Arguments<Storage> arguments(p, shape, random);
  // Makes the states of a leaky cell fade as fast as in other cells.
  const Array<Storage>& rate = arguments.parameters[kOwn];
  std::fill_n(rate.data(), rate.size(), power_of_two<Storage>(1));
  const Results<Storage> results(p, shape, random);
  const Runtime runtime = runtime_of(1, p.l2_bytes);
  forced_plan = {1, 1, 0};
  run_forward(kernels, p, arguments.layer, results, runtime);

  // Binary exponents of the smallest normal number, and of the distance from 1 to the next number.
  // bfloat16 has the same exponents as float.
  constexpr int smallest = std::numeric_limits<Computed<Storage>>::min_exponent - 1;
  const int distance = 1 - bits;
  const double tiny = std::ldexp(1.0, smallest);
  const double terms = double(p.gate_rows());  // number of terms in the gradient of an input
  const int far_above = smallest - distance + std::ilogb(terms) + 30;
  // Runs the backward pass with the gradients of h_n multiplied by 2^scale. Returns the gradients
  // of the inputs divided by 2^scale.
  const auto gradients = [&](int scale) {
    const Array<Storage>& grad = arguments.grad_last[0];
    std::fill_n(grad.data(), grad.size(), power_of_two<Storage>(far_above + 10 + scale));
    run_backward(kernels, p, arguments, results, runtime);
    std::vector<double> found = numbers<double>(results[kGradInput]);
    for (double& value : found) value = std::ldexp(value, -scale);
    return found;
  };
  const std::vector<double> exact = gradients(40), found = gradients(0);
  double most = 0;
  for (size_t row = 0; row < exact.size(); row += size_t(p.D)) {
    double largest = 0;
    for (int64_t i = 0; i < p.D; ++i) largest = std::fmax(largest, std::fabs(exact[row + i]));
    for (int64_t i = 0; i < p.D; ++i) {
      const double lost = std::fabs(exact[row + i] - found[row + i]);
      most = std::fmax(most, lost / tiny);
      if (!(lost <= terms * tiny + 2 * std::ldexp(largest, distance))) {
        fail((cell.title + ": a gradient lost more than subnormal numbers explain").c_str());
      }
      if (lost > 0 && std::fabs(exact[row + i]) > std::ldexp(1.0, far_above)) {
        fail((cell.title + ": a gradient far above subnormal numbers lost accuracy").c_str());
      }
    }
  }
  if (most < 1) fail((cell.title + ": no gradient became subnormal").c_str());
  std::printf(
      "%s, %zu bytes: fading gradients lose at most %.3g times the smallest normal number\n",
      cell.title.c_str(), sizeof(Storage), most);
  std::fflush(stdout);
}

}  // namespace

void check_accuracy(const TestedCell& cell, const Kernels& kernels) {
  check_budget<float>(cell, kernels);
  check_budget<double>(cell, kernels);
  check_budget<BFloat16>(cell, kernels);
  check_budget<Half>(cell, kernels);
  check_fading<float>(cell, kernels);
  check_fading<double>(cell, kernels);
  check_fading<BFloat16>(cell, kernels);
}

void check_accuracy(const TestedCell& cell, const KernelsFor<BFloat16>& kernels) {
  check_budget(cell, kernels);
  check_fading(cell, kernels);
}

void check_accuracy(const TestedCell& cell, const KernelsFor<float>& kernels, int bits) {
  check_budget(cell, kernels, bits);
  check_fading(cell, kernels, bits);
}

}  // namespace namernn_fast
