// The reference for accuracy.cpp: a layer computed from the equations, one row at a time.
#pragma once

#include <array>
#include <cmath>
#include <complex>

#include "problem.h"

namespace namernn_fast {

template <class Number, class Storage>
std::vector<Number> numbers(const Array<Storage>& array) {
  std::vector<Number> found;
  for (int64_t i = 0; i < array.size(); ++i) found.push_back(Number(number(array.data()[i])));
  return found;
}

// Rounds to the given number of significant bits.
template <class Number>
Number rounded(Number value, int bits) {
  int exponent = 0;
  const Number fraction = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}

template <class Number, class Storage>
std::vector<Number> rounded_numbers(const Array<Storage>& array, int bits) {
  std::vector<Number> found = numbers<Number>(array);
  for (Number& value : found) value = rounded(value, bits);
  return found;
}

// Indices of the values that a hidden unit's step depends on: for each gate, the sum over the input
// and the sum over the previous state; then the unit's previous states, its own parameters, the
// inputs besides x, and the means over all units.
enum Dependency {
  kFromInput,
  kFromState = 4,
  kPrevious = 8,
  kOwnBlocks = kPrevious + kMostStates,
  kBeside = kOwnBlocks + 3,
  kMean = kBeside + kTestedInputs,
  kAll = kMean + 2
};
// Returns the number of means over all units that a cell computes.
inline int count_means(const Cell& cell) { return cell.states_need_rows ? 2 : 0; }

// A dual number: the real part is a value, and the imaginary part is kSmall times the derivative of
// the value with respect to one Dependency. kSmall squared is negligible.
template <class Number>
using Dual = std::complex<Number>;
constexpr float kSmall = 0x1p-50f;

template <class Value>
struct RealOf {
  using Type = Value;
};
template <class Number>
struct RealOf<Dual<Number>> {
  using Type = Number;
};

// Holds the rounded numbers that a hidden unit keeps for the backward pass, and its rounded output.
// A step in plain numbers writes the kept numbers and continues with the unrounded numbers. A step
// in Duals continues with the kept numbers, as the backward pass does.
template <class Number>
struct Keeper {
  using D = Dual<Number>;
  Number* kept;
  int64_t stride;  // between two kept numbers
  Number output;   // read by a step in Duals
  int bits;
  bool relu;

  Number number(int block, Number x) const { return kept[block * stride] = rounded(x, bits), x; }
  Number sigmoid(int block, Number x) const { return number(block, sigmoid(x)); }
  Number tanh(int block, Number x) const { return number(block, tanh(x)); }
  Number act(Number x) const { return relu ? std::max(x, Number(0)) : tanh(x); }

  D number(int block, D x) const { return {kept[block * stride], x.imag()}; }
  D sigmoid(int block, D x) const { return sigmoid_of(x, kept[block * stride]); }
  D tanh(int block, D x) const { return tanh_of(x, kept[block * stride]); }
  D act(D x) const { return relu ? D(output, output > 0 ? x.imag() : 0) : tanh_of(x, output); }

  // Functions for numbers that are not kept.
  static Number sigmoid(Number x) { return 1 / (1 + std::exp(-x)); }
  static Number tanh(Number x) { return std::tanh(x); }
  static D sigmoid(D x) { return sigmoid_of(x, sigmoid(x.real())); }
  static D tanh(D x) { return tanh_of(x, tanh(x.real())); }

  static D sigmoid_of(D x, Number y) { return {y, y * (1 - y) * x.imag()}; }
  static D tanh_of(D x, Number y) { return {y, (1 - y * y) * x.imag()}; }
};

// The states of a hidden unit after a step, before any projection.
template <class Value>
using States = std::array<Value, kMostStates>;

// Computes a hidden unit's step from the values `of`, indexed by Dependency.
template <class Value, class Number>
States<Value> step_of(CellKind kind, const Value (&of)[kAll], const Keeper<Number>& keep) {
  const auto sum = [&](int gate) { return of[kFromInput + gate] + of[kFromState + gate]; };
  const Value* previous = of + kPrevious;
  switch (kind) {
    case CellKind::gru: {
      const Value r = keep.sigmoid(1, sum(0)), z = keep.sigmoid(2, sum(1));
      const Value n_h = keep.number(3, of[kFromState + 2]);
      const Value n = keep.tanh(0, of[kFromInput + 2] + r * n_h);
      return {n + z * (previous[0] - n)};
    }
    case CellKind::lstm: {
      const Value i = keep.sigmoid(0, sum(0)), f = keep.sigmoid(1, sum(1));
      const Value g = keep.tanh(2, sum(2)), o = keep.sigmoid(3, sum(3));
      const Value c = keep.number(4, f * previous[1] + i * g);
      return {o * keep.tanh(c), c};
    }
    case CellKind::leaky: {
      const Value difference = keep.number(0, sum(0) - previous[1]);
      const Value moved = previous[1] + keep.sigmoid(of[kOwnBlocks]) * difference;
      const Value v = keep.number(1, moved + of[kBeside]);
      return {keep.act(v), v};
    }
    case CellKind::independent: {
      const Value f = keep.sigmoid(0, of[kFromInput]);
      const Value c = keep.number(1, f * previous[1] + of[kFromInput + 1]);
      return {keep.act(c), c};
    }
    case CellKind::four_states:
    case CellKind::with_means: {
      const Number half = Number(0.5), one = 1;
      const Value i = keep.sigmoid(0, sum(0) - of[kMean] + of[kOwnBlocks + 1]);
      const Value g = keep.tanh(1, sum(1) - of[kMean] + of[kOwnBlocks + 2]);
      const Value c = keep.number(2, i * previous[1] + half * (one - i) * g);
      const Value n = keep.number(3, half * (previous[2] + i));
      const Value m = keep.number(4, g * previous[3] + half * previous[0] + of[kBeside]);
      const Value weight = keep.sigmoid(of[kOwnBlocks]) * m + of[kBeside + 1];
      return {keep.act(c + of[kMean + 1] + weight * n), c, n, m};
    }
    default:
      return {keep.act(sum(0))};
  }
}

// Returns the value whose mean over all units is of[kMean + mean]. `states` are from step_of(), and
// may be computed with later means still unset.
template <class Value>
Value averaged(int mean, const Value (&of)[kAll], const States<Value>& states) {
  using Real = typename RealOf<Value>::Type;
  if (mean == 1) return Real(0.0625) - states[1];
  const Value sums = of[kFromInput] + of[kFromState] + of[kFromInput + 1] + of[kFromState + 1];
  return sums / Real(2);
}

// A layer in plain loops. Everything that is multiplied or stored is rounded: inputs, weights,
// states, values kept for the backward pass, gradients of sums, and results.
template <class Number>
class Plain {
  using Numbers = std::vector<Number>;

 public:
  // `results` holds the initial values of the gradients that the passes add to.
  template <class Storage>
  Plain(const Problem& p, const Shape& shape, const Arguments<Storage>& arguments,
        const Results<Storage>& results, int bits)
      : p_(p),
        shape_(shape),
        bits_(bits),
        ids_(arguments.ids.data()),
        cuts_(arguments.resets.data()),
        input_(rounded_numbers<Number>(arguments.input, bits)),
        grad_output_(numbers<Number>(arguments.grad_output)),
        zero_state_(p.H) {
    for (int i = 0; i < p.cell->states; ++i) {
      initial_.push_back(i == 0 ? rounded_numbers<Number>(arguments.initial[i], bits)
                                : numbers<Number>(arguments.initial[i]));
      grad_last_.push_back(numbers<Number>(arguments.grad_last[i]));
    }
    for (const auto& beside : arguments.beside) beside_.push_back(numbers<Number>(beside));
    for (int i = 0; i < kParameters; ++i) {
      const bool is_weight = i == kWeightHh || i == kWeightHr || (i == kWeightIh && !p.V);
      parameters_.push_back(is_weight ? rounded_numbers<Number>(arguments.parameters[i], bits)
                                      : numbers<Number>(arguments.parameters[i]));
    }
    for (int i = 0; i < kNames; ++i) {
      results_.push_back(p.accumulates(Name(i)) ? numbers<Number>(results[Name(i)])
                                                : Numbers(p.size_of(Name(i), shape.rows)));
    }
    // The loops compute all results, requested or not.
    const Problem all = everything(p);
    for (int i = 0; i < kNames; ++i) {
      if (!p.wants(Name(i))) results_[i].resize(all.size_of(Name(i), shape.rows));
    }
    gradient(kBiasHh).resize(p.gate_rows());
    for (int i = 0; i < p.cell->inputs; ++i) {
      results_[grad_beside_of(i)].resize(shape.rows * features_beside(*p.cell, i, p.H));
    }
  }

  // Runs both passes. Returns the results, indexed by Name, with NaN in padding.
  const std::vector<Numbers>& run() {
    for (int64_t b = 0; b < p_.B; ++b) {
      std::vector<Numbers> cells(p_.cell->states, Numbers(p_.H));
      for (int64_t s = 0; s < shape_.length[b]; ++s) forward(b, s, cells);
      std::copy_n(state_after(b, shape_.length[b] - 1), P_, cells[0].data());
      write_states(b, cells, kLast);
    }
    for (int64_t b = 0; b < p_.B; ++b) {
      std::vector<Numbers> grads;
      for (int i = 0; i < p_.cell->states; ++i) grads.push_back(last_gradient(b, i));
      for (int64_t s = shape_.length[b]; s-- > 0;) backward(b, s, grads);
      write_states(b, grads, kGradInitial);
    }
    for (Numbers& values : results_) {
      for (Number& value : values) value = rounded(value, bits_);
    }
    mark_padding();
    return results_;
  }

 private:
  static Problem everything(Problem p) {
    p.want_input = p.want_hx = p.want_weights = p.bias = true;
    return p;
  }

  void mark_padding() {
    for (int64_t t = 0; p_.kind == Kind::any_order && t < p_.T; ++t) {
      for (int64_t b = shape_.count[t]; b < p_.B; ++b) {
        for (int name = kOutput; name < kLast; ++name) {
          const int64_t size = int64_t(results_[name].size()) / shape_.rows;
          std::fill_n(results_[name].data() + shape_.row(t, b) * size, size, Number(NAN));
        }
      }
    }
  }

  // Writes the states of sequence b, or gradients of them, to the results that start at `first`.
  void write_states(int64_t b, const std::vector<Numbers>& states, Name first) {
    for (size_t i = 0; i < states.size(); ++i) {
      const int64_t size = p_.size_of_state(int(i));
      std::copy_n(states[i].data(), size, &results_[first + i][place(b) * size]);
    }
  }

  // Returns the gradient of the i-th last state of sequence b.
  Numbers last_gradient(int64_t b, int i) const {
    const int64_t size = p_.size_of_state(i);
    Numbers grad(size);
    for (int64_t j = 0; p_.grad_last[i] && j < size; ++j) {
      grad[j] = grad_last_[i][p_.expanded_grad[i] ? 0 : place(b) * size + j];
    }
    return grad;
  }

  int64_t place(int64_t b) const { return shape_.order[b]; }
  int64_t time(int64_t b, int64_t s) const { return p_.reverse ? shape_.length[b] - 1 - s : s; }
  int64_t row(int64_t b, int64_t s) const { return shape_.row(time(b, s), b); }
  const Number* state_after(int64_t b, int64_t s) const {
    return &results_[kOutput][row(b, s) * P_];
  }

  // Returns whether a cut makes sequence b restart from zeros at step s.
  bool is_cut(int64_t b, int64_t s) const {
    const int64_t border = time(b, s) + p_.reverse;  // the cut is before this time
    return p_.resets && border < shape_.length[b] && cuts_[border * p_.B + b];
  }
  bool begins_at_zero(int64_t b, int64_t s) const { return is_cut(b, s) || (s == 0 && !p_.hx); }
  const Number* previous_state(int64_t b, int64_t s) const {
    if (begins_at_zero(b, s)) return zero_state_.data();
    return s == 0 ? &initial_[0][place(b) * P_] : state_after(b, s - 1);
  }

  // Returns the values that a row keeps. The last blocks are the cell states.
  const Number* kept_at(int64_t b, int64_t s) const {
    return results_[kKept].data() + row(b, s) * p_.cell->kept * p_.H;
  }
  // Returns the i-th previous state, with i > 0.
  const Number* previous_cell_state(int64_t b, int64_t s, int64_t i) const {
    if (begins_at_zero(b, s)) return zero_state_.data();
    if (s == 0) return &initial_[i][place(b) * (p_.H + i)];
    return kept_at(b, s - 1) + (p_.cell->kept - p_.cell->states + i) * p_.H;
  }

  // Returns sums + bias + weight x, where x is a row's input or previous state. With several heads,
  // a unit multiplies the K elements of x that belong to its head.
  Numbers add_product(Numbers sums, Parameter bias, Parameter weight, const Number* x, int64_t K,
                      int64_t heads) const {
    for (int64_t i = 0; i < p_.gate_rows(); ++i) {
      const Number* of_head = x + head_of(i, heads) * K;
      if (p_.bias) sums[i] += parameters_[bias][i];
      for (int64_t k = 0; k < K; ++k) sums[i] += parameters_[weight][i * K + k] * of_head[k];
    }
    return sums;
  }
  // Returns the head of row i of a weight.
  int64_t head_of(int64_t i, int64_t heads) const { return i % p_.H / (p_.H / heads); }

  // Runs step s of sequence b and updates the cell states, `cells[1]` and so on. As in the kernels,
  // only stored copies are rounded, so the next step continues from unrounded cell states.
  void forward(int64_t b, int64_t s, std::vector<Numbers>& cells) {
    const int64_t G = p_.gate_rows();
    Numbers start(G);
    if (p_.V) std::copy_n(&parameters_[kWeightIh][ids_[row(b, s)] * G], G, start.data());
    const Number* x = input_.data() + row(b, s) * p_.input_features();
    if (p_.sums_given) std::copy_n(x, G, start.data());
    const Number* previous = previous_state(b, s);
    const Numbers from_input = add_product(start, kBiasIh, kWeightIh, x, p_.D, 1);
    Numbers from_state(G);
    if (p_.cell->has_weight_hh) {
      from_state = add_product(from_state, kBiasHh, kWeightHh, previous, p_.R(), p_.heads);
    }
    for (size_t i = 1; i < cells.size() && (s == 0 || is_cut(b, s)); ++i) {
      std::copy_n(previous_cell_state(b, s, int64_t(i)), p_.H, cells[i].data());
    }
    Numbers y(p_.H), means(2);
    const auto dependencies_of = [&](int64_t j, Number(&of)[kAll]) {
      for (int64_t gate = 0; gate < p_.cell->gates; ++gate) {
        of[kFromInput + gate] = from_input[gate * p_.H + j];
        of[kFromState + gate] = from_state[gate * p_.H + j];
      }
      if (P_ == p_.H) of[kPrevious] = previous[j];
      for (size_t i = 1; i < cells.size(); ++i) of[kPrevious + i] = cells[i][j];
      read_unit(b, s, j, of);
      std::copy(means.begin(), means.end(), of + kMean);
    };
    for (int mean = 0; mean < count_means(*p_.cell); ++mean) {
      Number sum = 0;
      for (int64_t j = 0; j < p_.H; ++j) {
        Number of[kAll]{};
        dependencies_of(j, of);
        sum += averaged(mean, of, step_of(p_.cell->kind, of, keeper(b, s, j, 0)));
      }
      means[mean] = sum / Number(p_.H);
    }
    for (int64_t j = 0; j < p_.H; ++j) {
      Number of[kAll]{};
      dependencies_of(j, of);
      const States<Number> states = step_of(p_.cell->kind, of, keeper(b, s, j, 0));
      y[j] = states[0];
      for (size_t i = 1; i < cells.size(); ++i) cells[i][j] = states[i];
    }
    Number* h = &results_[kOutput][row(b, s) * P_];
    for (int64_t i = 0; i < P_; ++i) {
      Number sum = 0;
      for (int64_t j = 0; P_ < p_.H && j < p_.H; ++j)
        sum += parameters_[kWeightHr][i * p_.H + j] * y[j];
      h[i] = rounded(P_ < p_.H ? sum : y[i], bits_);
    }
  }

  // Sets what unit j's step depends on besides sums, states and means: its own parameters and the
  // inputs besides x.
  template <class Value>
  void read_unit(int64_t b, int64_t s, int64_t j, Value (&of)[kAll]) const {
    for_each_own_block([&](int parameter, int64_t block, int dependency) {
      of[dependency] = parameters_[parameter][block * p_.H + j];
    });
    for (int i = 0; i < p_.cell->inputs; ++i) {
      const int64_t features = features_beside(*p_.cell, i, p_.H);
      if (p_.beside[i]) of[kBeside + i] = beside_[i][row(b, s) * features + j % features];
    }
  }

  // Calls f(parameter, block, dependency) for each block of the cell's own parameters.
  template <class F>
  void for_each_own_block(F&& f) const {
    int dependency = kOwnBlocks;
    for (int i = 0; i < p_.cell->own; ++i) {
      for (int64_t block = 0; block < p_.cell->own_blocks[i]; ++block) {
        f(kOwn + i, block, dependency++);
      }
    }
  }

  Keeper<Number> keeper(int64_t b, int64_t s, int64_t j, Number output) {
    Number* kept = results_[kKept].data() + row(b, s) * p_.cell->kept * p_.H + j;
    return {kept, p_.H, output, bits_, p_.relu};
  }

  // The states of a hidden unit after a step, and the values that are averaged over all units, each
  // with its derivatives with respect to each Dependency.
  struct Derivatives {
    std::array<States<Dual<Number>>, kAll> states;
    std::array<std::array<Dual<Number>, kAll>, 2> averaged;
  };
  // Returns the Derivatives of hidden unit j after step s of sequence b.
  Derivatives derivatives(int64_t b, int64_t s, int64_t j) {
    Dual<Number> of[kAll];  // the values of the sums and means are not used
    if (P_ == p_.H) of[kPrevious] = previous_state(b, s)[j];
    for (int i = 1; i < p_.cell->states; ++i) {
      of[kPrevious + i] = previous_cell_state(b, s, i)[j];
    }
    read_unit(b, s, j, of);
    const Number output = P_ == p_.H ? state_after(b, s)[j] : Number(0);
    Derivatives found;
    for (int i = 0; i < kAll; ++i) {
      of[i].imag(kSmall);
      found.states[i] = step_of(p_.cell->kind, of, keeper(b, s, j, output));
      for (int mean = 0; mean < count_means(*p_.cell); ++mean) {
        found.averaged[mean][i] = averaged(mean, of, found.states[i]);
      }
      of[i].imag(0);
    }
    return found;
  }

  // Runs the backward pass of step s of sequence b. Replaces `grads`, the gradients of the states
  // after step s, with the gradients of the previous states.
  void backward(int64_t b, int64_t s, std::vector<Numbers>& grads) {
    Numbers& grad_h = grads[0];
    for (int64_t j = 0; p_.grad_output && j < P_; ++j) {
      grad_h[j] += grad_output_[row(b, s) * P_ + j];
    }
    const int64_t H = p_.H, gates = p_.cell->gates;
    std::vector<Derivatives> units;
    for (int64_t j = 0; j < H; ++j) units.push_back(derivatives(b, s, j));
    if (P_ < H) {
      Numbers y;
      for (const Derivatives& unit : units) y.push_back(unit.states[0][0].real());
      grad_h = projected_back(y, grad_h);
    }
    std::vector<std::array<Number, kAll>> of_units(H);
    for (int64_t j = 0; j < H; ++j) {
      for (int i = 0; i < kAll; ++i) {
        Number& grad = of_units[j][i];
        grad = 0;
        for (size_t n = 0; n < grads.size(); ++n) {
          grad += grads[n][j] * units[j].states[i][n].imag();
        }
        grad /= kSmall;
      }
    }
    for (int mean = count_means(*p_.cell); mean-- > 0;) {
      Number of_mean = 0;
      for (const auto& grad : of_units) of_mean += grad[kMean + mean];
      for (int64_t j = 0; j < H; ++j) {
        for (int i = 0; i < kAll; ++i) {
          of_units[j][i] += of_mean / Number(H) * (units[j].averaged[mean][i].imag() / kSmall);
        }
      }
    }
    Numbers from_input(gates * H), from_state(gates * H), around(H);
    for (int i = 0; i < p_.cell->inputs; ++i) {
      const int64_t features = features_beside(*p_.cell, i, H);
      Number* grad = &results_[grad_beside_of(i)][row(b, s) * features];
      for (int64_t j = 0; j < H; ++j) grad[j % features] += of_units[j][kBeside + i];
    }
    for (int64_t j = 0; j < H; ++j) {
      const auto& grad = of_units[j];
      for (int64_t gate = 0; gate < gates; ++gate) {
        from_input[gate * H + j] = rounded(grad[kFromInput + gate], bits_);
        from_state[gate * H + j] = rounded(grad[kFromState + gate], bits_);
      }
      around[j] = grad[kPrevious];
      for (size_t n = 1; n < grads.size(); ++n) grads[n][j] = grad[kPrevious + n];
      for_each_own_block([&](int parameter, int64_t block, int dependency) {
        gradient(parameter)[block * H + j] += rounded(grad[dependency], bits_);
      });
    }
    const Number* x = input_.data() + row(b, s) * p_.input_features();
    Number* grad_x = results_[kGradInput].data() + row(b, s) * p_.input_features();
    for (int64_t i = 0; p_.sums_given && i < p_.gate_rows(); ++i) grad_x[i] += from_input[i];
    grad_h.assign(around.begin(), around.begin() + P_);
    if (p_.cell->has_weight_hh) {
      add_gradients(from_state, kBiasHh, kWeightHh, previous_state(b, s), p_.R(), p_.heads,
                    grad_h.data());
    }
    add_gradients(from_input, kBiasIh, kWeightIh, x, p_.D, 1, grad_x);
    for (int64_t i = 0; p_.V && i < p_.gate_rows(); ++i) {
      gradient(kWeightIh)[ids_[row(b, s)] * p_.gate_rows() + i] += from_input[i];
    }
    if (!is_cut(b, s)) return;
    for (size_t n = 0; n < grads.size(); ++n) grads[n].assign(p_.size_of_state(int(n)), 0);
  }

  // Returns the gradient of y (h before its projection), given the gradient of h. Also adds to the
  // gradient of weight_hr.
  Numbers projected_back(const Numbers& y, const Numbers& grad_h) {
    const int64_t H = p_.H;
    Numbers grad(H);
    for (int64_t i = 0; i < P_; ++i) {
      for (int64_t j = 0; j < H; ++j) {
        grad[j] += grad_h[i] * parameters_[kWeightHr][i * H + j];
        gradient(kWeightHr)[i * H + j] += grad_h[i] * y[j];
      }
    }
    return grad;
  }

  // Given `grad`, the gradient of bias + weight x, adds to the gradients of bias, weight and x. The
  // arguments are as in add_product().
  void add_gradients(const Numbers& grad, Parameter bias, Parameter weight, const Number* x,
                     int64_t K, int64_t heads, Number* grad_x) {
    for (int64_t i = 0; i < p_.gate_rows(); ++i) {
      const int64_t first = head_of(i, heads) * K;  // the first element of x that row i multiplies
      gradient(bias)[i] += grad[i];
      for (int64_t k = 0; k < K; ++k) {
        grad_x[first + k] += grad[i] * parameters_[weight][i * K + k];
        gradient(weight)[i * K + k] += grad[i] * x[first + k];
      }
    }
  }

  Numbers& gradient(int parameter) { return results_[gradient_of(parameter)]; }

  const Problem& p_;
  const int64_t P_ = p_.P();
  const Shape& shape_;
  const int bits_;
  const int64_t* ids_;
  const char* cuts_;
  const Numbers input_;
  std::vector<Numbers> initial_, grad_last_;  // indexed by state
  std::vector<Numbers> beside_;               // inputs besides x; empty if absent
  std::vector<Numbers> parameters_;           // indexed by Parameter; weight_ih may be the table
  const Numbers grad_output_, zero_state_;
  std::vector<Numbers> results_;  // indexed by Name
};

}  // namespace namernn_fast
