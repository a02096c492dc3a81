"""The oracle: RNNs, GRUs, LSTMs and leaky RNNs in NumPy, with handwritten backpropagation.

The oracle shares no code with the library. It computes one sequence at a time, in the precision of
its arrays: float64 or longdouble.
"""

import numpy as np


class Rounding:
    """Defines how a layer rounds its numbers. This base class does not round."""

    def numbers(self, values):
        """Rounds numbers stored in the layer's dtype: inputs, states, and what a cell keeps."""
        return values

    def computed(self, values):
        """Rounds intermediate results, which stay in the precision of sums."""
        return values

    def operands(self, x, h):
        """Rounds an input and a state for their products with weights."""
        return x, h

    def sums(self, values, *products):
        """Rounds `values`, the sum of `matrix @ vector` over the pairs in `products`."""
        return values

    def terms(self, values, count):
        """Rounds terms so that a sum of `count` such terms has the error of a rounded sum."""
        return values


EXACT = Rounding()


class Nudges(Rounding):
    """Moves numbers up or down at random, by about as much as rounding can.

    A number moves by one unit in its last place; zero and infinity do not move. A sum of K terms
    moves by `sum_eps / 2 * sqrt(K / 2)` times the root sum of squares of its terms. That is about
    the error of adding the terms one by one, because the root mean square of the partial sums is
    about the size of a sum of K / 2 terms. Sums in lanes, chains or trees have smaller partial
    sums, and so smaller errors.

    Args:
        eps: The unit in the last place of 1 in the dtype of the numbers.
        tiny: The smallest normal number of that dtype. All smaller numbers have the same
            last place.
        sum_eps: `eps` of the precision in which sums are computed.
        seed: The seed of the random directions.
    """

    def __init__(self, eps, tiny, sum_eps, seed):
        self.eps, self.tiny, self.sum_eps = eps, tiny, sum_eps
        self.generator = np.random.default_rng(seed)

    def _signs(self, values):
        return 2 * self.generator.integers(2, size=values.shape) - 1

    def _moved(self, values, eps):
        moving = np.isfinite(values) & (values != 0)
        last_place = eps * np.maximum(np.abs(values), self.tiny)
        return values + np.where(moving, last_place, 0) * self._signs(values)

    def numbers(self, values):
        return self._moved(values, self.eps)

    def computed(self, values):
        return self._moved(values, self.sum_eps)

    def sums(self, values, *products):
        squares = sum(matrix**2 @ vector**2 for matrix, vector in products)
        squares = np.where(np.isfinite(squares), squares, 0)
        count = sum(len(vector) for _, vector in products)
        return values + self.sum_eps / 2 * np.sqrt(count / 2 * squares) * self._signs(values)

    def terms(self, values, count):
        return values * (1 + self.sum_eps / 2 * np.sqrt(count / 2) * self._signs(values))


class Equation:
    """One step of a cell. The output is the first part of a state."""

    parts = 1  # the number of parts in a state
    has_rate = False  # whether the last weight is the rate, and noise follows the input

    def arguments(self, x, hx, states, kept, weights):
        """Returns the arguments of the activation, and for each the sum of squares of its terms."""
        (weight_ih, weight_hh, *biases), size = weights, weights[1].shape[1]
        previous = np.concatenate([hx[None], states[:-1]])[:, :size]
        z = x @ weight_ih.T + previous @ weight_hh.T + sum(biases)
        squares = x**2 @ weight_ih.T**2 + previous**2 @ weight_hh.T**2 + sum(b**2 for b in biases)
        return z, squares


class Vanilla(Equation):
    """h_t = act(z_t), z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh.

    Args:
        activation: The function act.
        derivative: The derivative of act, as a function of h = act(z).
    """

    def __init__(self, activation, derivative):
        self.activation, self.derivative = activation, derivative

    def step(self, x, h, weights, rounding):
        """Returns the next state, and the values of this step that `gradients` needs."""
        weight_ih, weight_hh, *biases = weights
        x, h = rounding.operands(x, h)
        z = weight_ih @ x + weight_hh @ h + sum(biases)
        z = rounding.sums(z, (weight_ih, x), (weight_hh, h))
        state = rounding.numbers(self.activation(z))
        return state, state

    def gradients(self, grad, previous, kept, rounding):
        """Returns the gradients of a step, given the gradient of its state.

        Sums depend only on the first part of the previous state.

        Returns:
            The gradient of the input's sums, the gradient of the previous state's sums, and the
            part of the previous state's gradient that bypasses the sums, or None.
        """
        # Some kernels round dz to 16 bits before multiplying it.
        dz = rounding.numbers(grad * self.derivative(kept))
        return dz, dz, None


def sigmoid(x):
    """Returns 1 / (1 + exp(-x)), with a small relative error for any x."""
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


class Gru(Equation):
    """r, z = sigmoid(x_rz + h_rz), n = tanh(x_n + r h_n), h_t = n + z (h_{t-1} - n).

    x_r, x_z and x_n are the blocks of W_ih x_t + b_ih, and h_r, h_z and h_n are the blocks of
    W_hh h_{t-1} + b_hh.
    """

    def step(self, x, h, weights, rounding):
        weight_ih, weight_hh, *biases = weights
        size = len(h)
        gates, new = slice(2 * size), slice(2 * size, None)
        x, operand = rounding.operands(x, h)
        x_sums, h_sums = weight_ih @ x, weight_hh @ operand
        if biases:
            x_sums, h_sums = x_sums + biases[0], h_sums + biases[1]
        sums = rounding.sums(
            x_sums[gates] + h_sums[gates], (weight_ih[gates], x), (weight_hh[gates], operand)
        )
        r, z = np.split(rounding.computed(sigmoid(sums)), 2)
        x_n = rounding.sums(x_sums[new], (weight_ih[new], x))
        h_n = rounding.sums(h_sums[new], (weight_hh[new], operand))
        n = rounding.computed(np.tanh(rounding.computed(x_n + r * h_n)))
        kept = [rounding.numbers(values) for values in (r, z, n, h_n)]
        return rounding.numbers(n + z * (h - n)), kept

    def gradients(self, grad, previous, kept, rounding):
        r, z, n, h_n = kept
        d_n = grad * (1 - z) * (1 - n * n)
        d_r = d_n * h_n * (r * (1 - r))
        d_z = grad * (previous - n) * (z * (1 - z))
        dz_x = rounding.computed(np.concatenate([d_r, d_z, d_n]))
        dz_h = rounding.computed(np.concatenate([d_r, d_z, d_n * r]))
        return dz_x, dz_h, rounding.computed(grad * z)


class Lstm(Equation):
    """i, f, o = sigmoid(z_ifo), g = tanh(z_g), c_t = f c_{t-1} + i g, h_t = o tanh(c_t).

    z = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh has the blocks i, f, g and o. A state is h_t and c_t.
    With projections, h_t = W_hr (o tanh(c_t)).
    """

    parts = 2

    def step(self, x, state, weights, rounding):
        weight_ih, weight_hh, *rest = weights
        biases, projection = split_rest(rest)
        h, c_previous = np.split(state, [weight_hh.shape[1]])
        x, h = rounding.operands(x, h)
        z = weight_ih @ x + weight_hh @ h + sum(biases)
        z_i, z_f, z_g, z_o = np.split(rounding.sums(z, (weight_ih, x), (weight_hh, h)), 4)
        i, f, o = (rounding.computed(sigmoid(gate)) for gate in (z_i, z_f, z_o))
        g = rounding.computed(np.tanh(z_g))
        c = rounding.computed(f * c_previous + i * g)
        h = o * rounding.computed(np.tanh(c))
        for weight_hr in projection:
            h = rounding.sums(weight_hr @ h, (weight_hr, h))
        h = rounding.numbers(h)
        kept = [rounding.numbers(values) for values in (i, f, g, o, c)]
        return np.concatenate([h, c]), kept

    def gradients(self, grad, previous, kept, rounding):
        i, f, g, o, c = kept
        grad_h, grad_c = np.split(grad, 2)
        tanh_c = rounding.computed(np.tanh(c))
        d_c = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
        c_previous = rounding.numbers(previous[-len(c) :])
        d_z = [
            d_c * g * (i * (1 - i)),
            d_c * c_previous * (f * (1 - f)),
            d_c * i * (1 - g * g),
            grad_h * tanh_c * (o * (1 - o)),
        ]
        d_z = rounding.numbers(np.concatenate(d_z))
        no_grad_h = np.zeros(len(previous) - len(c), grad.dtype)
        return d_z, d_z, np.concatenate([no_grad_h, rounding.computed(d_c * f)])

    def unprojected(self, kept, rounding):
        """Returns h before its projection."""
        _, _, _, o, c = kept
        return rounding.computed(o * rounding.computed(np.tanh(c)))


class Leaky(Equation):
    """v_t = (1 - a) v_{t-1} + a z + noise, r_t = act(v_t), with a = sigmoid(rate).

    z = W_ih x_t + b_ih + W_hh r_{t-1} + b_hh. A state is r_t and v_t. The noise follows the input.

    Args:
        activation: The function act.
        derivative: The derivative of act, as a function of r = act(v) and v.
    """

    parts, has_rate = 2, True

    def __init__(self, activation, derivative):
        self.activation, self.derivative = activation, derivative

    def step(self, x, state, weights, rounding):
        weight_ih, weight_hh, *biases, rate = weights
        (r, v_previous), (x, noise) = np.split(state, 2), np.split(x, [weight_ih.shape[1]])
        x, r = rounding.operands(x, r)
        z = weight_ih @ x + weight_hh @ r + sum(biases)
        z = rounding.sums(z, (weight_ih, x), (weight_hh, r))
        a = rounding.computed(sigmoid(rate))
        difference = rounding.computed(z - v_previous)
        v = rounding.computed((1 - a) * v_previous + a * z)
        v = rounding.computed(v + noise) if len(noise) else v
        r = rounding.numbers(self.activation(v))
        return np.concatenate([r, v]), (a, rounding.numbers(difference), r, rounding.numbers(v))

    def gradients(self, grad, previous, kept, rounding):
        a, difference, r, v = kept
        grad_r, grad_v = np.split(grad, 2)
        d_v = rounding.computed(grad_v + grad_r * self.derivative(r, v))
        d_z = rounding.numbers(a * d_v)
        d_rate = rounding.numbers(d_v * difference * (a * (1 - a)))
        rest = np.concatenate([np.zeros_like(grad_r), rounding.computed((1 - a) * d_v)])
        return d_z, d_z, rest, d_rate, d_v

    def arguments(self, x, hx, states, kept, weights):
        weight_ih, weight_hh = weights[:2]
        features, size = weight_ih.shape[1], len(weight_hh)
        before, v = np.concatenate([hx[None], states[:-1]])[:, size:], states[:, size:]
        _, squares = super().arguments(x[:, :features], hx, states, kept, weights[:-1])
        a, noise = sigmoid(weights[-1]), x[:, features:]
        squares = a**2 * squares + ((1 - a) * before) ** 2
        return v, squares + (noise**2 if noise.size else 0)


EQUATIONS = {
    "tanh": Vanilla(np.tanh, lambda h: 1 - h * h),
    # The derivative of relu at NaN is 1, as in torch.
    "relu": Vanilla(lambda z: np.maximum(z, 0), lambda h: 1 - (h <= 0).astype(h.dtype)),
    "gru": Gru(),
    "lstm": Lstm(),
    "projected": Lstm(),
    "leaky tanh": Leaky(np.tanh, lambda r, v: 1 - r * r),
    "leaky relu": Leaky(lambda v: np.maximum(v, 0), lambda r, v: 1 - (r <= 0).astype(r.dtype)),
    "leaky sigmoid": Leaky(sigmoid, lambda r, v: r * (1 - r)),
    "leaky softplus": Leaky(lambda v: np.logaddexp(v, 0), lambda r, v: sigmoid(v)),
}


def split_rest(weights):
    """Returns the biases and weight_hr among the weights after weight_hh, each perhaps none."""
    return [w for w in weights if w.ndim == 1], [w for w in weights if w.ndim == 2]


def direction(x, h, weights, equation, rounding):
    """Returns the states (L, features) of one direction, and what the cell keeps from each step.

    `x` is the input (L, D), and `h` the initial state (features,).
    """
    states, kept = [], []
    for x_t in x:
        h, kept_t = equation.step(x_t, h, weights, rounding)
        states.append(h)
        kept.append(kept_t)
    return np.array(states), kept


def direction_backward(record, equation, grad_states, grad_last, rounding, rows):
    """Returns the gradients of x, hx and the weights of one direction.

    `grad_states` (L, P) holds the gradients of the outputs, and `grad_last` (features,) is the
    gradient of the last state. `rows` is the number of rows in all sequences. Each row adds a term
    to each weight's gradient.
    """
    x, hx, states, kept, (weight_ih, weight_hh, *rest) = record
    biases, projection = split_rest(rest[:-1] if equation.has_rate else rest)
    features = weight_ih.shape[1]
    grad_x = np.zeros_like(x)
    grads = [np.zeros_like(w) for w in (weight_ih, weight_hh, *rest)]
    grad_h = grad_last
    size = weight_hh.shape[1]
    for t in reversed(range(len(x))):
        previous = states[t - 1] if t else hx
        grad_h = grad_h.copy()
        grad_h[:size] += grad_states[t]
        of_weight_hr = []
        for weight_hr in projection:
            grad_projected, grad_c = np.split(grad_h, [size])
            of_weight_hr = [np.outer(grad_projected, equation.unprojected(kept[t], rounding))]
            grad_y = rounding.sums(grad_projected @ weight_hr, (weight_hr.T, grad_projected))
            grad_h = np.concatenate([grad_y, grad_c])
        gradients = equation.gradients(grad_h, previous, kept[t], rounding)
        dz_x, dz_h, rest, *of_rate_and_noise = gradients
        terms = [np.outer(dz_x, x[t, :features]), np.outer(dz_h, previous[:size])]
        terms += [dz_x, dz_h][: len(biases)] + of_weight_hr + of_rate_and_noise[:1]
        for grad, term in zip(grads, terms, strict=True):
            grad += rounding.terms(term, rows)
        grad_x[t, :features] = rounding.sums(dz_x @ weight_ih, (weight_ih.T, dz_x))
        if features < x.shape[1]:
            grad_x[t, features:] = of_rate_and_noise[1]
        if rest is None:
            grad_h = rounding.sums(dz_h @ weight_hh, (weight_hh.T, dz_h))
        else:
            ones = np.ones(1, rest.dtype)
            through_sums, around_sums = dz_h @ weight_hh, rest[:size]
            products = (weight_hh.T, dz_h), (around_sums[:, None], ones)
            grad_h = np.concatenate(
                [rounding.sums(around_sums + through_sums, *products), rest[size:]]
            )
    return grad_x, grad_h, grads


def rnn(sequences, hx, weights, equation, bidirectional, rounding=EXACT, noise=None):
    """Returns a list of outputs (L_b, directions * H), h_n, and the tape for `rnn_backward`.

    `sequences` is a list of inputs (L_b, D). `hx` and h_n are (layers * directions, B, features).
    `weights` is a flat list in the order of torch's parameters, and `equation` is a key of
    `EQUATIONS`. `noise` is None, or a list of arrays (L_b, layers * directions * H).
    """
    size = weights[1].shape[1]
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // len(hx)
    h_n = np.zeros_like(hx)
    outputs, tape = [], []
    for b, layer_input in enumerate(sequences):
        records = []
        for k in range(0, len(hx), directions):
            states = []
            for d in range(directions):
                direction_weights = weights[(k + d) * per_direction : (k + d + 1) * per_direction]
                x = layer_input
                if noise is not None:
                    x = np.concatenate([x, np.split(noise[b], len(hx), -1)[k + d]], -1)
                x = x[::-1] if d else x
                h, kept = direction(
                    x, hx[k + d, b], direction_weights, EQUATIONS[equation], rounding
                )
                records.append((x, hx[k + d, b], h, kept, direction_weights))
                h_n[k + d, b] = h[-1]
                states.append(h[::-1, :size] if d else h[:, :size])
            layer_input = np.concatenate(states, -1)
        outputs.append(layer_input)
        tape.append(records)
    return outputs, h_n, tape


def rnn_backward(
    tape, hx, weights, equation, bidirectional, grad_outputs, grad_h_n, rounding=EXACT
):
    """Returns the gradients of the sequences, of hx, of the weights and of the noise.

    All except the gradient of hx are lists; there are no gradients of noise if there is none.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // len(hx)
    grad_hx = np.zeros_like(hx)
    grad_weights = [np.zeros_like(w) for w in weights]
    grad_sequences, grad_noise = [], []
    size = weights[1].shape[1]
    rows = sum(map(len, grad_outputs))
    for b, (records, grad) in enumerate(zip(tape, grad_outputs, strict=True)):
        grads_of_noise = []
        for k in reversed(range(0, len(hx), directions)):
            grad_input = 0
            for d in range(directions):
                grad_states = grad[:, d * size : (d + 1) * size]
                grad_x, grad_hx[k + d, b], direction_grads = direction_backward(
                    records[k + d],
                    EQUATIONS[equation],
                    grad_states[::-1] if d else grad_states,
                    grad_h_n[k + d, b],
                    rounding,
                    rows,
                )
                grad_x = grad_x[::-1] if d else grad_x
                features = weights[(k + d) * per_direction].shape[1]
                grad_input = grad_input + grad_x[:, :features]
                grads_of_noise.append((k + d, grad_x[:, features:]))
                for i, grad_weight in enumerate(direction_grads):
                    grad_weights[(k + d) * per_direction + i] += grad_weight
            grad = grad_input
        grad_sequences.append(grad)
        grad_noise.append(np.concatenate([g for _, g in sorted(grads_of_noise)], -1))
    return grad_sequences, grad_hx, grad_weights, grad_noise


def near_a_kink(tape, unit, tiny, equation="relu"):
    """Returns whether rounding may move any sum z across the kink of relu at zero.

    Rounding may do so if |z| is at most `unit` times the root sum of squares of the terms of z.
    This root counts as at least `tiny`, because states and their rounding errors fade if the input
    is zero. A z of exactly zero counts as a sum of zeros, which rounding does not change.
    """
    for records in tape:
        for record in records:
            z, squares = EQUATIONS[equation].arguments(*record)
            near = np.abs(z) <= unit * np.maximum(np.sqrt(squares), tiny)
            if (near & np.isfinite(z) & (z != 0)).any():
                return True
    return False
