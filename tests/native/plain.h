// A layer computed one row at a time, straight from the equations: the reference for accuracy.cpp.
#pragma once

#include <cmath>

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

// A layer in plain loops that round everything they multiply or store: inputs, weights, states,
// what the cell keeps, gradients of sums, and results.
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
        hx_(rounded_numbers<Number>(arguments.hx, bits)),
        cx_(numbers<Number>(arguments.cx)),
        table_(numbers<Number>(arguments.table)),
        weight_ih_(rounded_numbers<Number>(arguments.weight_ih, bits)),
        weight_hh_(rounded_numbers<Number>(arguments.weight_hh, bits)),
        weight_hr_(rounded_numbers<Number>(arguments.weight_hr, bits)),
        bias_ih_(numbers<Number>(arguments.bias_ih)),
        bias_hh_(numbers<Number>(arguments.bias_hh)),
        rate_(numbers<Number>(arguments.rate)),
        noise_(numbers<Number>(arguments.noise)),
        grad_output_(numbers<Number>(arguments.grad_output)),
        grad_h_n_(numbers<Number>(arguments.grad_h_n)),
        grad_c_n_(numbers<Number>(arguments.grad_c_n)),
        zero_state_(p.H),
        cx_stride_(arguments.layer.initial[1].stride) {
    for (int i = 0; i < kNames; ++i) {
      results_.push_back(p.accumulates(Name(i)) ? numbers<Number>(results[Name(i)])
                                                : Numbers(p.size_of(Name(i), shape.rows)));
    }
    // The loops compute all results, wanted or not.
    const Problem all = everything(p);
    for (int i = 0; i < kNames; ++i) {
      if (!p.wants(Name(i))) results_[i].resize(all.size_of(Name(i), shape.rows));
    }
    results_[kGradBiasHh].resize(p.gate_rows());
    results_[kGradNoise].resize(shape.rows * p.H);
  }

  // Runs both passes. Returns the results, indexed by Name, with NaN in padding.
  const std::vector<Numbers>& run() {
    for (int64_t b = 0; b < p_.B; ++b) {
      Numbers c(p_.H);
      for (int64_t s = 0; s < shape_.length[b]; ++s) forward(b, s, c);
      std::copy_n(state_after(b, shape_.length[b] - 1), P_, &results_[kLast][place(b) * P_]);
      if (p_.cell->has_cell_state)
        std::copy_n(c.data(), p_.H, &results_[kLastCell][place(b) * p_.H]);
    }
    for (int64_t b = 0; b < p_.B; ++b) {
      Numbers grad_h = last_gradient(b, grad_h_n_, P_, p_.grad_h_n, p_.expanded_grad);
      Numbers grad_c = last_gradient(b, grad_c_n_, p_.H, p_.grad_c_n, p_.expanded_grad_c);
      for (int64_t s = shape_.length[b]; s-- > 0;) backward(b, s, grad_h, grad_c);
      std::copy_n(grad_h.data(), P_, &results_[kGradHx][place(b) * P_]);
      if (p_.cell->has_cell_state)
        std::copy_n(grad_c.data(), p_.H, &results_[kGradCx][place(b) * p_.H]);
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
  static Number sigmoid(Number x) { return 1 / (1 + std::exp(-x)); }

  void mark_padding() {
    for (int64_t t = 0; p_.kind == Kind::any_order && t < p_.T; ++t) {
      for (int64_t b = shape_.count[t]; b < p_.B; ++b) {
        for (const Name name : {kOutput, kKept, kGradInput, kGradNoise}) {
          const int64_t size = int64_t(results_[name].size()) / shape_.rows;
          std::fill_n(results_[name].data() + shape_.row(t, b) * size, size, Number(NAN));
        }
      }
    }
  }

  // Returns the gradient of the last state, or of the last cell state, of sequence b.
  Numbers last_gradient(int64_t b, const Numbers& grads, int64_t size, bool has_grads,
                        bool expanded) const {
    Numbers grad(size);
    for (int64_t j = 0; has_grads && j < size; ++j) {
      grad[j] = grads[expanded ? 0 : place(b) * size + j];
    }
    return grad;
  }

  int64_t place(int64_t b) const { return shape_.order[b]; }
  int64_t time(int64_t b, int64_t s) const { return p_.reverse ? shape_.length[b] - 1 - s : s; }
  int64_t row(int64_t b, int64_t s) const { return shape_.row(time(b, s), b); }
  const Number* state_after(int64_t b, int64_t s) const {
    return &results_[kOutput][row(b, s) * P_];
  }

  // Returns whether a cut makes sequence b continue from zeros at step s.
  bool is_cut(int64_t b, int64_t s) const {
    const int64_t border = time(b, s) + p_.reverse;  // the cut is before this time
    return p_.resets && border < shape_.length[b] && cuts_[border * p_.B + b];
  }
  bool begins_at_zero(int64_t b, int64_t s) const { return is_cut(b, s) || (s == 0 && !p_.hx); }
  const Number* previous_state(int64_t b, int64_t s) const {
    if (begins_at_zero(b, s)) return zero_state_.data();
    return s == 0 ? &hx_[place(b) * P_] : state_after(b, s - 1);
  }

  // Returns the values that a row keeps. The last block is the cell state, if the cell has one.
  const Number* kept_at(int64_t b, int64_t s) const {
    return results_[kKept].data() + row(b, s) * p_.cell->kept * p_.H;
  }
  const Number* previous_cell_state(int64_t b, int64_t s) const {
    if (begins_at_zero(b, s)) return zero_state_.data();
    return s == 0 ? &cx_[place(b) * cx_stride_] : kept_at(b, s - 1) + (p_.cell->kept - 1) * p_.H;
  }

  // Returns sums + bias + weight x, where x is a row's input or previous state.
  Numbers add_product(Numbers sums, const Numbers& bias, const Numbers& weight, const Number* x,
                      int64_t K) const {
    for (int64_t i = 0; i < p_.gate_rows(); ++i) {
      if (p_.bias) sums[i] += bias[i];
      for (int64_t k = 0; k < K; ++k) sums[i] += weight[i * K + k] * x[k];
    }
    return sums;
  }

  // Runs step s of sequence b and updates the cell state c. As in the kernels, only stored copies
  // of c are rounded, so the next step continues from the unrounded c.
  void forward(int64_t b, int64_t s, Numbers& c) {
    const int64_t G = p_.gate_rows();
    Numbers start(G);
    if (p_.V) std::copy_n(&table_[ids_[row(b, s)] * G], G, start.data());
    const Number* x = input_.data() + row(b, s) * p_.D;
    const Number* previous = previous_state(b, s);
    const Numbers from_input = add_product(start, bias_ih_, weight_ih_, x, p_.D);
    const Numbers from_state = add_product(Numbers(G), bias_hh_, weight_hh_, previous, P_);
    Number* h = &results_[kOutput][row(b, s) * P_];
    Number* kept = results_[kKept].data() + row(b, s) * p_.cell->kept * p_.H;
    switch (p_.cell->kind) {
      case CellKind::vanilla:
        return vanilla(from_input, from_state, h);
      case CellKind::gru:
        return gru(from_input, from_state, previous, h, kept);
      case CellKind::lstm:
        if (s == 0 || is_cut(b, s)) std::copy_n(previous_cell_state(b, s), p_.H, c.data());
        return lstm(from_input, from_state, c, h, kept);
      case CellKind::leaky:
        if (s == 0 || is_cut(b, s)) std::copy_n(previous_cell_state(b, s), p_.H, c.data());
        return leaky(from_input, from_state, p_.noise ? &noise_[row(b, s) * p_.H] : nullptr, c, h,
                     kept);
    }
  }

  Number act(Number z) const {
    return rounded(p_.relu ? std::max(z, Number(0)) : std::tanh(z), bits_);
  }
  // Returns the gradient of z, given the gradient of y = act(z).
  Number act_gradient(Number grad, Number y) const {
    return p_.relu ? (y > 0 ? grad : Number(0)) : grad * (1 - y * y);
  }

  void vanilla(const Numbers& from_input, const Numbers& from_state, Number* h) const {
    for (int64_t j = 0; j < p_.H; ++j) h[j] = act(from_input[j] + from_state[j]);
  }

  void leaky(const Numbers& from_input, const Numbers& from_state, const Number* noise, Numbers& v,
             Number* h, Number* kept) const {
    for (int64_t j = 0; j < p_.H; ++j) {
      const Number a = sigmoid(rate_[j]), z = from_input[j] + from_state[j];
      kept[j] = rounded(z - v[j], bits_);
      v[j] = (1 - a) * v[j] + a * z + (noise ? noise[j] : Number(0));
      kept[p_.H + j] = rounded(v[j], bits_);
      h[j] = act(v[j]);
    }
  }

  void gru(const Numbers& from_input, const Numbers& from_state, const Number* previous, Number* h,
           Number* kept) const {
    const int64_t H = p_.H;
    for (int64_t j = 0; j < H; ++j) {
      const Number r = sigmoid(from_input[j] + from_state[j]);
      const Number z = sigmoid(from_input[H + j] + from_state[H + j]);
      const Number n = std::tanh(from_input[2 * H + j] + r * from_state[2 * H + j]);
      h[j] = rounded((1 - z) * n + z * previous[j], bits_);
      kept[j] = rounded(n, bits_);
      kept[H + j] = rounded(r, bits_);
      kept[2 * H + j] = rounded(z, bits_);
      kept[3 * H + j] = rounded(from_state[2 * H + j], bits_);
    }
  }

  void lstm(const Numbers& from_input, const Numbers& from_state, Numbers& c, Number* h,
            Number* kept) const {
    const int64_t H = p_.H;
    Numbers y(H);
    for (int64_t j = 0; j < H; ++j) {
      const Number i = sigmoid(from_input[j] + from_state[j]);
      const Number f = sigmoid(from_input[H + j] + from_state[H + j]);
      const Number g = std::tanh(from_input[2 * H + j] + from_state[2 * H + j]);
      const Number o = sigmoid(from_input[3 * H + j] + from_state[3 * H + j]);
      c[j] = f * c[j] + i * g;
      y[j] = o * std::tanh(c[j]);
      kept[j] = rounded(i, bits_);
      kept[H + j] = rounded(f, bits_);
      kept[2 * H + j] = rounded(g, bits_);
      kept[3 * H + j] = rounded(o, bits_);
      kept[4 * H + j] = rounded(c[j], bits_);
    }
    for (int64_t i = 0; i < P_; ++i) {
      Number sum = 0;
      for (int64_t j = 0; P_ < H && j < H; ++j) sum += weight_hr_[i * H + j] * y[j];
      h[i] = rounded(P_ < H ? sum : y[i], bits_);
    }
  }

  // `from_input` and `from_state` are the gradients of what the input and the previous state add to
  // the sums. `previous` is the part of the previous state's gradient that bypasses the sums.
  struct Gradients {
    Numbers from_input, from_state, previous;
  };

  Gradients vanilla_gradients(int64_t b, int64_t s, const Numbers& grad_h) const {
    Numbers dz(p_.H);
    for (int64_t j = 0; j < p_.H; ++j) {
      dz[j] = rounded(act_gradient(grad_h[j], state_after(b, s)[j]), bits_);
    }
    return {dz, dz, Numbers(p_.H)};
  }

  // Returns the gradients of the sums at step s, writes the gradient of the noise, and adds to the
  // gradient of the rate. Replaces grad_v, the gradient of v after step s, with the gradient of the
  // previous v.
  Gradients leaky_gradients(int64_t b, int64_t s, const Numbers& grad_h, Numbers& grad_v) {
    Numbers dz(p_.H);
    for (int64_t j = 0; j < p_.H; ++j) {
      const Number a = sigmoid(rate_[j]);
      const Number dv = grad_v[j] + act_gradient(grad_h[j], state_after(b, s)[j]);
      dz[j] = rounded(a * dv, bits_);
      if (p_.want_weights) {
        results_[kGradRate][j] += rounded(dv * kept_at(b, s)[j] * a * (1 - a), bits_);
      }
      results_[kGradNoise][row(b, s) * p_.H + j] = dv;
      grad_v[j] = (1 - a) * dv;
    }
    return {dz, dz, Numbers(p_.H)};
  }

  Gradients gru_gradients(int64_t b, int64_t s, const Numbers& grad_h) const {
    const int64_t H = p_.H;
    const Number* kept = kept_at(b, s);
    const Number* previous = previous_state(b, s);
    Gradients grad{Numbers(3 * H), Numbers(3 * H), Numbers(H)};
    for (int64_t j = 0; j < H; ++j) {
      const Number n = kept[j], r = kept[H + j], z = kept[2 * H + j], n_h = kept[3 * H + j];
      const Number dn = grad_h[j] * (1 - z) * (1 - n * n);
      const Number dr = dn * n_h * r * (1 - r);
      const Number dz = grad_h[j] * (previous[j] - n) * z * (1 - z);
      grad.from_input[j] = grad.from_state[j] = rounded(dr, bits_);
      grad.from_input[H + j] = grad.from_state[H + j] = rounded(dz, bits_);
      grad.from_input[2 * H + j] = rounded(dn, bits_);
      grad.from_state[2 * H + j] = rounded(dn * r, bits_);
      grad.previous[j] = grad_h[j] * z;
    }
    return grad;
  }

  // Returns the gradients of the sums at step s. Replaces grad_c, the gradient of the cell state
  // after step s, with the gradient of the previous cell state.
  Gradients lstm_gradients(int64_t b, int64_t s, const Numbers& grad_h, Numbers& grad_c) const {
    const int64_t H = p_.H;
    const Number* kept = kept_at(b, s);
    const Number* previous = previous_cell_state(b, s);
    Numbers dz(4 * H);
    for (int64_t j = 0; j < H; ++j) {
      const Number i = kept[j], f = kept[H + j], g = kept[2 * H + j], o = kept[3 * H + j];
      const Number t = std::tanh(kept[4 * H + j]);
      const Number dc = grad_c[j] + grad_h[j] * o * (1 - t * t);
      dz[j] = rounded(dc * g * i * (1 - i), bits_);
      dz[H + j] = rounded(dc * previous[j] * f * (1 - f), bits_);
      dz[2 * H + j] = rounded(dc * i * (1 - g * g), bits_);
      dz[3 * H + j] = rounded(grad_h[j] * t * o * (1 - o), bits_);
      grad_c[j] = dc * f;
    }
    return {dz, dz, Numbers(H)};
  }

  Gradients gradients(int64_t b, int64_t s, const Numbers& grad_h, Numbers& grad_c) {
    switch (p_.cell->kind) {
      case CellKind::leaky:
        return leaky_gradients(b, s, grad_h, grad_c);
      case CellKind::gru:
        return gru_gradients(b, s, grad_h);
      case CellKind::lstm:
        return lstm_gradients(b, s, grad_h, grad_c);
      default:
        return vanilla_gradients(b, s, grad_h);
    }
  }

  // Runs the backward pass of step s of sequence b. Replaces grad_h and grad_c, the gradients of
  // the states after step s, with the gradients of the previous states.
  void backward(int64_t b, int64_t s, Numbers& grad_h, Numbers& grad_c) {
    for (int64_t j = 0; p_.grad_output && j < P_; ++j) {
      grad_h[j] += grad_output_[row(b, s) * P_ + j];
    }
    if (P_ < p_.H) grad_h = projected_back(b, s, grad_h);
    const Gradients grad = gradients(b, s, grad_h, grad_c);
    const Number* x = input_.data() + row(b, s) * p_.D;
    grad_h.assign(grad.previous.begin(), grad.previous.begin() + P_);
    add_gradients(grad.from_state, weight_hh_, previous_state(b, s), P_, grad_h.data(),
                  results_[kGradWeightHh].data(), results_[kGradBiasHh].data());
    add_gradients(grad.from_input, weight_ih_, x, p_.D,
                  results_[kGradInput].data() + row(b, s) * p_.D, results_[kGradWeightIh].data(),
                  results_[kGradBiasIh].data());
    for (int64_t i = 0; p_.V && i < p_.gate_rows(); ++i) {
      results_[kGradWeightIh][ids_[row(b, s)] * p_.gate_rows() + i] += grad.from_input[i];
    }
    if (!is_cut(b, s)) return;
    grad_h.assign(P_, 0);
    grad_c.assign(p_.H, 0);
  }

  // Returns the gradient of h before its projection, given the gradient of h after step s, and adds
  // to the gradient of weight_hr.
  Numbers projected_back(int64_t b, int64_t s, const Numbers& grad_h) {
    const int64_t H = p_.H;
    const Number* kept = kept_at(b, s);
    Numbers grad(H);
    for (int64_t i = 0; i < P_; ++i) {
      for (int64_t j = 0; j < H; ++j) {
        grad[j] += grad_h[i] * weight_hr_[i * H + j];
        results_[kGradWeightHr][i * H + j] +=
            grad_h[i] * kept[3 * H + j] * std::tanh(kept[4 * H + j]);
      }
    }
    return grad;
  }

  // Adds to the gradients of x, weight and bias, given `grad`, the gradient of bias + weight x.
  void add_gradients(const Numbers& grad, const Numbers& weight, const Number* x, int64_t K,
                     Number* grad_x, Number* grad_weight, Number* grad_bias) const {
    for (int64_t i = 0; i < p_.gate_rows(); ++i) {
      grad_bias[i] += grad[i];
      for (int64_t k = 0; k < K; ++k) {
        grad_x[k] += grad[i] * weight[i * K + k];
        grad_weight[i * K + k] += grad[i] * x[k];
      }
    }
  }

  const Problem& p_;
  const int64_t P_ = p_.P();
  const Shape& shape_;
  const int bits_;
  const int64_t* ids_;
  const char* cuts_;
  const Numbers input_, hx_, cx_, table_, weight_ih_, weight_hh_, weight_hr_, bias_ih_, bias_hh_;
  const Numbers rate_, noise_;
  const Numbers grad_output_, grad_h_n_, grad_c_n_, zero_state_;
  const int64_t cx_stride_;
  std::vector<Numbers> results_;  // indexed by Name
};

}  // namespace namernn_fast
