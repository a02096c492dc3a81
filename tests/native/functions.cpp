// Measures the errors of functions such as exp over their whole domain. Each function runs as a
// program of one instruction.
#include <algorithm>
#include <cstdio>

#include "driver.h"
#include "programs.h"

namespace namernn_fast {
namespace {

template <class Number>
struct Function {
  Operation operation;
  Number (*exact)(Number);
  double bound;  // of the error, in units in the last place
  bool flushes;  // whether results below twice the smallest normal number may be zero
};
// Square roots and quotients are rounded correctly, which limits rsqrt to 1.5 units. The other
// bounds are a few percent above the largest errors that 30 million arguments had with any
// instruction set, in float or double: 1.04, 2.11, 0.81, 1.44, 2.61, 2.31 and 2.71.
template <class Number>
constexpr Function<Number> functions[] = {
    {Operation::sqrt, std::sqrt, 0.5, false},
    {Operation::recip, [](Number x) { return 1 / x; }, 0.5, false},
    {Operation::rsqrt, [](Number x) { return 1 / std::sqrt(x); }, 1.5, false},
    {Operation::exp, std::exp, 1.25, false},
    {Operation::expm1, std::expm1, 2.25, false},
    {Operation::log, std::log, 0.95, false},
    {Operation::log1p, std::log1p, 1.5, false},
    {Operation::tanh, std::tanh, 2.75, false},
    {Operation::sigmoid, [](Number x) { return 1 / (1 + std::exp(-x)); }, 2.5, true},
    {Operation::softplus,
     [](Number x) { return std::fmax(x, Number(0)) + std::log1p(std::exp(-std::fabs(x))); }, 3,
     true}};

// Returns numbers of every binade and NaNs, more numbers in the ranges where the functions vary,
// and the neighbours of zeros, infinities and the thresholds in nonlinearities.h.
template <class Scalar>
std::vector<Scalar> samples() {
  using Limits = std::numeric_limits<Scalar>;
  using Bits = std::conditional_t<sizeof(Scalar) == 4, uint32_t, uint64_t>;
  std::vector<Scalar> found;
  const auto add = [&](Bits bits) {
    Scalar x;
    std::memcpy(&x, &bits, sizeof(x));
    found.push_back(x);
  };
  constexpr Bits patterns = 1 << 18, distance = ~Bits(0) / patterns;
  for (Bits i = 0; i < patterns; ++i) add(i * distance);
  Random random;
  for (const int range : {1, 20, 128, 1024}) {
    for (int i = 0; i < 1 << 16; ++i) {
      random.draw(found.emplace_back(), 0);
      found.back() *= Scalar(range);
    }
  }
  const Scalar least = std::log(Limits::min()), most = std::log(Limits::max());
  for (const Scalar x :
       {Scalar(0), Limits::min(), Limits::infinity(), std::sqrt(Scalar(0.5)), std::sqrt(Scalar(2)),
        Scalar(1), Scalar(10), Scalar(20), Scalar(50), Scalar(87), Scalar(89), Scalar(105),
        Scalar(708), Scalar(710), Scalar(746), least, std::log(Limits::denorm_min()), most}) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof(x));
    for (Bits i = 0; i < 128; ++i) {
      add(bits + i - 64);
      found.push_back(-found.back());
    }
  }
  return found;
}

// Returns the error of y in units in the last place of the exact value. Infinity counts as the
// number after the largest number.
template <class Scalar, class Number>
double units_of_error(Scalar y, Number exact) {
  using Limits = std::numeric_limits<Scalar>;
  if (std::isnan(y) || std::isnan(exact)) return std::isnan(y) == std::isnan(exact) ? 0 : INFINITY;
  const Number end = std::ldexp(Number(1), Limits::max_exponent);
  const Number close = std::clamp(exact, -end, end);
  const int exponent = std::max(std::ilogb(close), Limits::min_exponent - 1);
  const Number error = std::fabs(std::clamp(Number(y), -end, end) - close);
  return double(std::ldexp(error, Limits::digits - 1 - exponent));
}

// Builds for sanitizers do not fuse multiply-adds, so their quotients are less accurate.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr double kSlack = 1.5;
#else
constexpr double kSlack = 1;
#endif

template <class Scalar>
void check_function(const Function<Higher<Scalar>>& function, const Kernels& kernels,
                    const std::string& title) {
  const std::string name = kOperations[int(function.operation)].name;
  const Cell cell = cell_of_text("equation 1 name " + name +
                                     " gates 1 separate 0 weight_hh 1 heads 0 states 1 inputs 0 "
                                     "own 0 kept 0 constants 0 forward 1 " +
                                     name + " h0 s0 backward 1 copy d0 g0 end",
                                 kernels);
  const Array<Scalar> x(samples<Scalar>()), y(x.size());
  StateRows<Scalar> rows{};
  rows.range = {0, 1, 0, x.size()};
  rows.H = rows.sum_stride = x.size();
  rows.sums = {x.data(), x.size()};
  rows.states[0] = {y.data(), x.size()};
  rows.program = cell.program;
  static_cast<const CellCode<Scalar>&>(cell).states_of(rows);
  const Scalar tiny = 2 * std::numeric_limits<Scalar>::min();
  double most = 0;
  for (int64_t i = 0; i < x.size(); ++i) {
    const Scalar at = x.data()[i], value = y.data()[i];
    const Higher<Scalar> exact = function.exact(Higher<Scalar>(at));
    if (function.flushes && std::fabs(exact) < tiny && std::fabs(value) < tiny) continue;
    const double error = units_of_error(value, exact);
    most = std::max(most, error);
    if (error <= kSlack * function.bound) continue;
    std::fprintf(stderr, "%s, %zu bytes: %s(%.17g) is %.17g instead of %.17g, ", title.c_str(),
                 sizeof(Scalar), name.c_str(), double(at), double(value), double(exact));
    fail("the error is too large");
  }
  std::printf("%s, %zu bytes: %s errs by %.2f ulp at most\n", title.c_str(), sizeof(Scalar),
              name.c_str(), most);
  std::fflush(stdout);
}

}  // namespace

void check_functions(const Kernels& kernels, const std::string& title) {
  for (const auto& function : functions<double>) check_function<float>(function, kernels, title);
  for (const auto& function : functions<long double>) {
    check_function<double>(function, kernels, title);
  }
}

}  // namespace namernn_fast
