// Checks the forward and backward kernels against the error budget: the error of a result, judged
// by an RNN in higher precision, may be twice that of a plain loop in the kernel's precision plus
// one unit in the last place of the largest value.
#include <algorithm>
#include <cstdio>
#include <string>

#include "driver.h"

namespace namernn_fast {
namespace {

struct Problem {
  int64_t D, H, T, B;
  bool relu;
};

// The indices of one problem's arguments and results.
enum Argument { kInput, kHx, kWeightIh, kWeightHh, kBiasIh, kBiasHh, kGradOutput, kGradLast };
enum Name { kOutput, kLast, kGradInput, kGradHx, kGradWeightIh, kGradWeightHh, kGradBias, kNames };
const char* const names[] = {
    "output", "h_n", "grad_input", "grad_hx", "grad_weight_ih", "grad_weight_hh", "grad_bias"};
template <class Number>
using Values = std::vector<std::vector<Number>>;

// For each storage type, the type that kernels compute in, one of higher precision, and the number
// of significant bits that are stored.
template <class Storage>
struct Precision;
template <>
struct Precision<float> {
  using Own = float;
  using Higher = double;
  static constexpr int bits = 24;
};
template <>
struct Precision<double> {
  using Own = double;
  using Higher = long double;
  static constexpr int bits = 53;
};
template <>
struct Precision<BFloat16> {
  using Own = float;
  using Higher = double;
  static constexpr int bits = 8;
};
template <>
struct Precision<Half> {
  using Own = float;
  using Higher = double;
  static constexpr int bits = 11;
};

double number(float value) { return value; }
double number(double value) { return value; }
double number(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
double number(Half value) {
  const int exponent = value.bits >> 10 & 31;
  const double fraction = value.bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return value.bits >> 15 ? -size : size;
}

// Rounds to the given number of significant bits.
template <class Number>
Number rounded(Number value, int bits) {
  int exponent = 0;
  const Number part = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(part, bits)), exponent - bits);
}

// One layer over dense rows (T, B, ...), computed as the equation reads. States, dz and results are
// rounded.
template <class Number>
class Plain {
 public:
  Plain(const Problem& p, const Values<double>& arguments, int bits) : p_(p), bits_(bits) {
    for (const auto& values : arguments) arguments_.emplace_back(values.begin(), values.end());
  }

  Values<Number> run() {
    const auto [D, H, T, B, relu] = p_;
    results_ = {std::vector<Number>(T * B * H), std::vector<Number>(B * H),
                std::vector<Number>(T * B * D), std::vector<Number>(B * H),
                std::vector<Number>(H * D),     std::vector<Number>(H * H),
                std::vector<Number>(H)};
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < B; ++b) forward(t, b);
    }
    for (int64_t b = 0; b < B; ++b) {
      std::copy_n(state(T, b), H, &results_[kLast][b * H]);
      std::copy_n(&arguments_[kGradLast][b * H], H, &results_[kGradHx][b * H]);
    }
    for (int64_t t = T - 1; t >= 0; --t) {
      for (int64_t b = 0; b < B; ++b) backward(t, b);
    }
    for (auto& values : results_) {
      for (Number& value : values) value = rounded(value, bits_);
    }
    return results_;
  }

 private:
  // The state of sequence b before time t.
  const Number* state(int64_t t, int64_t b) const {
    return t ? &results_[kOutput][((t - 1) * p_.B + b) * p_.H] : &arguments_[kHx][b * p_.H];
  }

  void forward(int64_t t, int64_t b) {
    const auto [D, H, T, B, relu] = p_;
    const Number* x = &arguments_[kInput][(t * B + b) * D];
    const Number* h = state(t, b);
    for (int64_t j = 0; j < H; ++j) {
      Number sum = arguments_[kBiasIh][j] + arguments_[kBiasHh][j];
      for (int64_t k = 0; k < D; ++k) sum += arguments_[kWeightIh][j * D + k] * x[k];
      for (int64_t k = 0; k < H; ++k) sum += arguments_[kWeightHh][j * H + k] * h[k];
      const Number value = relu ? std::max(sum, Number(0)) : std::tanh(sum);
      results_[kOutput][(t * B + b) * H + j] = rounded(value, bits_);
    }
  }

  void backward(int64_t t, int64_t b) {
    const auto [D, H, T, B, relu] = p_;
    const Number* x = &arguments_[kInput][(t * B + b) * D];
    const Number* h = state(t, b);
    Number* grad_h = &results_[kGradHx][b * H];
    std::vector<Number> dz(H);
    for (int64_t j = 0; j < H; ++j) {
      const Number y = results_[kOutput][(t * B + b) * H + j];
      const Number grad = arguments_[kGradOutput][(t * B + b) * H + j] + grad_h[j];
      dz[j] = rounded(relu ? (y > 0 ? grad : Number(0)) : grad * (1 - y * y), bits_);
    }
    std::fill_n(grad_h, H, Number(0));
    for (int64_t j = 0; j < H; ++j) {
      results_[kGradBias][j] += dz[j];
      for (int64_t k = 0; k < D; ++k) {
        results_[kGradInput][(t * B + b) * D + k] += dz[j] * arguments_[kWeightIh][j * D + k];
        results_[kGradWeightIh][j * D + k] += dz[j] * x[k];
      }
      for (int64_t k = 0; k < H; ++k) {
        grad_h[k] += dz[j] * arguments_[kWeightHh][j * H + k];
        results_[kGradWeightHh][j * H + k] += dz[j] * h[k];
      }
    }
  }

  const Problem p_;
  const int bits_;
  Values<Number> arguments_;
  Values<Number> results_;
};

template <class Storage>
std::vector<double> numbers(const Array<Storage>& array) {
  std::vector<double> found;
  for (int64_t i = 0; i < array.size(); ++i) found.push_back(number(array.data()[i]));
  return found;
}

// Random arguments, in the order of Argument.
template <class Storage>
std::vector<Array<Storage>> draw(const Problem& p, Random& random) {
  std::vector<Array<Storage>> drawn;
  const int64_t rows = p.T * p.B;
  drawn.emplace_back(rows * p.D, random, 0);
  drawn.emplace_back(p.B * p.H, random, 0);
  for (const int64_t size : {p.H * p.D, p.H * p.H, p.H, p.H}) drawn.emplace_back(size, random, 3);
  drawn.emplace_back(rows * p.H, random, 0);
  drawn.emplace_back(p.B * p.H, random, 0);
  return drawn;
}

// The results of the kernels, in the order of Name.
template <class Storage>
Values<double> run(const KernelsFor<Storage>& kernels, const Problem& p,
                   const std::vector<Array<Storage>>& arguments) {
  const auto given = [&](Argument name) -> const Storage* { return arguments[name].data(); };
  const auto rows_of = [&](auto* data, int64_t size) {
    return RowStrides<std::remove_pointer_t<decltype(data)>>{data, p.B * size, size};
  };
  std::vector<Array<Storage>> found;
  for (const int64_t size :
       {p.T * p.B * p.H, p.B * p.H, p.T * p.B * p.D, p.B * p.H, p.H * p.D, p.H * p.H, p.H}) {
    found.emplace_back(size);
  }
  Layer<Storage> layer{};
  layer.layout.T = p.T;
  layer.layout.B = p.B;
  layer.layout.N = p.T * p.B;
  layer.D = p.D;
  layer.H = p.H;
  layer.activation = p.relu ? Activation::relu : Activation::tanh;
  layer.input = rows_of(given(kInput), p.D);
  layer.hx = given(kHx);
  layer.hx_stride = p.H;
  layer.weight_ih = given(kWeightIh);
  layer.weight_hh = given(kWeightHh);
  layer.bias_ih = given(kBiasIh);
  layer.bias_hh = given(kBiasHh);
  layer.chains = {kChain, kChain};
  const Runtime runtime = runtime_of(1, 1 << 20);
  kernels.forward({layer, rows_of(found[kOutput].data(), p.H), found[kLast].data()}, runtime);
  free_scratch();
  Backward<Storage> backward{};
  backward.layer = layer;
  const Storage* output = found[kOutput].data();
  backward.output = rows_of(output, p.H);
  backward.grad_output = rows_of(given(kGradOutput), p.H);
  backward.grad_h_n = given(kGradLast);
  backward.grad_h_n_stride = p.H;
  backward.grad_h_n_feature_stride = 1;
  backward.grad_input = rows_of(found[kGradInput].data(), p.D);
  backward.grad_hx = found[kGradHx].data();
  backward.grad_weight_ih = found[kGradWeightIh].data();
  backward.grad_weight_hh = found[kGradWeightHh].data();
  backward.grad_bias = found[kGradBias].data();
  kernels.backward(backward, runtime);
  free_scratch();
  Values<double> values;
  for (const Array<Storage>& array : found) values.push_back(numbers(array));
  return values;
}

// The fraction of its error budget that a result uses, over several draws.
struct Share {
  double ours = 0, plain = 0, largest = 0;

  template <class Own, class Higher>
  void add(const std::vector<double>& found, const std::vector<Own>& loop,
           const std::vector<Higher>& exact) {
    for (size_t i = 0; i < exact.size(); ++i) {
      // Comparisons with NaN are false: keep a NaN once it has occurred.
      const double error = std::fabs(double(found[i] - exact[i]));
      ours = std::isnan(ours) || error <= ours ? ours : error;
      plain = std::max(plain, double(std::fabs(loop[i] - exact[i])));
      largest = std::max(largest, double(std::fabs(exact[i])));
    }
  }
  double of_budget(int bits) const { return ours / (2 * plain + std::ldexp(largest, 1 - bits)); }
};

template <class Storage>
void check(const char* name, const KernelsFor<Storage>& kernels) {
  using Own = typename Precision<Storage>::Own;
  using Higher = typename Precision<Storage>::Higher;
  constexpr int bits = Precision<Storage>::bits;
  constexpr int draws = 4;
  static const int64_t shapes[][4] = {
      {5, 7, 6, 3}, {16, 48, 5, 1}, {9, 130, 4, 7}, {20, 33, 40, 9}};
  Random random;
  double most = 0;
  int problems = 0;
  forced_plan = {1, 1, 0};
  for (const auto& [D, H, T, B] : shapes) {
    // Not relu in 16 bits, where rounding a state may move it across the kink.
    for (const bool relu : {false, true}) {
      if (relu && sizeof(Storage) == 2) continue;
      const Problem p{D, H, T, B, relu};
      Share shares[kNames];
      for (int n = 0; n < draws; ++n) {
        const auto arguments = draw<Storage>(p, random);
        Values<double> given;
        for (const Array<Storage>& array : arguments) given.push_back(numbers(array));
        const auto found = run(kernels, p, arguments);
        const auto loop = Plain<Own>(p, given, bits).run();
        const auto exact = Plain<Higher>(p, given, 60).run();
        for (int i = 0; i < kNames; ++i) shares[i].add(found[i], loop[i], exact[i]);
        ++problems;
      }
      for (int i = 0; i < kNames; ++i) {
        const double share = shares[i].of_budget(bits);
        most = share <= most ? most : share;
        if (share <= 1) continue;
        std::fprintf(stderr, "%s, %zu bytes, (D, H, T, B) = (%d, %d, %d, %d), %s uses %.2f: ", name,
                     sizeof(Storage), int(D), int(H), int(T), int(B), names[i], share);
        fail("more than its error budget");
      }
    }
  }
  std::printf("%s, %d significant bits: %d problems take %.2f of the error budget at most\n", name,
              bits, problems, most);
  std::fflush(stdout);
}

}  // namespace

void check_accuracy(const Kernels& kernels) {
  check<float>(kernels.name, kernels);
  check<double>(kernels.name, kernels);
  check<BFloat16>(kernels.name, kernels);
  check<Half>(kernels.name, kernels);
}

}  // namespace namernn_fast
