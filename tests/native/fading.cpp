// Checks how much accuracy gradients that fade over many steps lose because subnormal numbers count
// as zero.
//
// Each term of a sum loses less than the smallest normal number. The loss may change the
// rounding of the result, and the rounding of one value that the result is computed from. Gradients
// far above the smallest normal number must not lose anything, because such a loss is too small to
// change their rounding.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "plain.h"

namespace namernn_fast {
namespace {

// Binary exponents of the smallest normal number and of the distance from 1 to the next number.
template <class Storage>
struct Limits {
  static constexpr int smallest = std::numeric_limits<Storage>::min_exponent - 1;
  static constexpr int distance = 1 - std::numeric_limits<Storage>::digits;
};
template <>
struct Limits<BFloat16> {
  static constexpr int smallest = -126;
  static constexpr int distance = -7;
};

template <class Storage>
Storage power_of_two(int exponent) {
  return Storage(std::ldexp(1.0, exponent));
}
template <>
BFloat16 power_of_two<BFloat16>(int exponent) {
  return {uint16_t((exponent + 127) << 7)};
}

// `distance` is the binary exponent of the distance from 1 to the next number that the kernels
// multiply.
template <class Storage>
void check(const TestedCell& cell, const KernelsFor<Storage>& kernels,
           const int distance = Limits<Storage>::distance) {
  static const int64_t shape_of_problem[4] = {3, 64, 250, 2};
  Problem p = problem_of<Storage>(cell, shape_of_problem, 0, 0);
  p.grad_h_n = p.want_input = p.want_output = true;
  Random random;
  const Shape shape(p);
  Arguments<Storage> arguments(p, shape, random);
  // Makes the states of a leaky cell fade as fast as those of other cells.
  std::fill_n(arguments.rate.data(), arguments.rate.size(), power_of_two<Storage>(1));
  const Results<Storage> results(p, shape, random);
  const Runtime runtime = runtime_of(1, p.l2_bytes);
  forced_plan = {1, 1, 0};
  run_forward(kernels, p, arguments.layer, results, runtime);

  constexpr int smallest = Limits<Storage>::smallest;
  const double tiny = std::ldexp(1.0, smallest);
  const double terms = double(p.gate_rows());  // number of terms in the gradient of an input
  const int far_above = smallest - distance + std::ilogb(terms) + 30;
  // Runs the backward pass with the gradients of h_n multiplied by 2^scale. Returns the gradients
  // of the inputs divided by 2^scale.
  const auto gradients = [&](int scale) {
    std::fill_n(arguments.grad_h_n.data(), arguments.grad_h_n.size(),
                power_of_two<Storage>(far_above + 10 + scale));
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
        fail((cell.name + ": a gradient lost more than subnormal numbers explain").c_str());
      }
      if (lost > 0 && std::fabs(exact[row + i]) > std::ldexp(1.0, far_above)) {
        fail((cell.name + ": a gradient far above subnormal numbers is not exact").c_str());
      }
    }
  }
  if (most < 1) fail((cell.name + ": no gradient became subnormal").c_str());
  std::printf(
      "%s, %zu bytes: fading gradients lose at most %.3g times the smallest normal number\n",
      cell.name.c_str(), sizeof(Storage), most);
  std::fflush(stdout);
}

}  // namespace

void check_fading(const TestedCell& cell, const KernelsOfCell& kernels) {
  check<float>(cell, kernels);
  check<double>(cell, kernels);
  check<BFloat16>(cell, kernels);
}

void check_fading(const TestedCell& cell, const KernelsFor<BFloat16>& kernels) {
  check<BFloat16>(cell, kernels);
}

void check_fading(const TestedCell& cell, const KernelsFor<float>& kernels, int bits) {
  check<float>(cell, kernels, 1 - bits);
}

}  // namespace namernn_fast
