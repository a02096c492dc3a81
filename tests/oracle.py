"""An RNN in NumPy, one sequence at a time, with handwritten backpropagation through time.

It shares no code with the library, and computes in the precision of its arrays: float64 or
longdouble.
"""

import numpy as np

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}
# Derivatives in terms of h = act(z). The derivative of relu at NaN is 1, as in torch.
DERIVATIVES = {"tanh": lambda h: 1 - h * h, "relu": lambda h: 1 - (h <= 0).astype(h.dtype)}


class Rounding:
    """How an RNN rounds its numbers. This base class does not round."""

    def numbers(self, values):
        """Rounds inputs, states and dz."""
        return values

    def sums(self, values, *products):
        """Rounds `values`, the sum of `matrix @ vector` over the pairs in `products`."""
        return values

    def terms(self, values, count):
        """Rounds terms so that a sum of `count` of them has the error of a rounded sum."""
        return values


EXACT = Rounding()


class Nudges(Rounding):
    """Moves numbers up or down at random, by about as much as rounding may.

    A number moves by one unit in its last place; zero and infinity stay. A sum of K terms moves by
    `sqrt(K / 2)` roundings of the root sum of squares of its terms. That is about the error of
    adding terms one after the other: the root mean square of the partial sums is that of K / 2
    terms. Sums in lanes, chains or trees round smaller partial sums.

    Args:
        eps: The unit in the last place of 1 in the dtype of the numbers.
        tiny: Its smallest normal number; smaller numbers have the same last place.
        sum_eps: `eps` of the precision in which sums are computed.
        seed: The seed of the random directions.
    """

    def __init__(self, eps, tiny, sum_eps, seed):
        self.eps, self.tiny, self.sum_eps = eps, tiny, sum_eps
        self.generator = np.random.default_rng(seed)

    def _signs(self, values):
        return 2 * self.generator.integers(2, size=values.shape) - 1

    def numbers(self, values):
        moving = np.isfinite(values) & (values != 0)
        last_place = self.eps * np.maximum(np.abs(values), self.tiny)
        return values + np.where(moving, last_place, 0) * self._signs(values)

    def sums(self, values, *products):
        squares = sum(matrix**2 @ vector**2 for matrix, vector in products)
        squares = np.where(np.isfinite(squares), squares, 0)
        count = sum(len(vector) for _, vector in products)
        return values + self.sum_eps / 2 * np.sqrt(count / 2 * squares) * self._signs(values)

    def terms(self, values, count):
        return values * (1 + self.sum_eps / 2 * np.sqrt(count / 2) * self._signs(values))


def direction(x, h, weights, nonlinearity, rounding):
    """Returns the states (L, H), given an input x (L, D) and an initial state h (H,)."""
    weight_ih, weight_hh, *biases = weights
    states = []
    for x_t in x:
        z = weight_ih @ x_t + weight_hh @ h + sum(biases)
        z = rounding.sums(z, (weight_ih, x_t), (weight_hh, h))
        h = rounding.numbers(ACTIVATIONS[nonlinearity](z))
        states.append(h)
    return np.array(states)


def direction_backward(
    x, hx, states, weights, nonlinearity, grad_states, grad_last, rounding, rows
):
    """Returns the gradients of x, hx and weights, given those of all states and the last state.

    `rows` is the total number of rows over which gradients of weights are summed.
    """
    weight_ih, weight_hh, *biases = weights
    grad_x = np.zeros_like(x)
    grad_ih, grad_hh = np.zeros_like(weight_ih), np.zeros_like(weight_hh)
    grad_bias = np.zeros_like(weight_hh[0])
    grad_h = grad_last
    for t in reversed(range(len(x))):
        dz = (grad_h + grad_states[t]) * DERIVATIVES[nonlinearity](states[t])
        dz = rounding.numbers(dz)
        grad_x[t] = rounding.sums(dz @ weight_ih, (weight_ih.T, dz))
        grad_ih += rounding.terms(np.outer(dz, x[t]), rows)
        grad_hh += rounding.terms(np.outer(dz, states[t - 1] if t else hx), rows)
        grad_bias += rounding.terms(dz, rows)
        grad_h = rounding.sums(dz @ weight_hh, (weight_hh.T, dz))
    return grad_x, grad_h, [grad_ih, grad_hh, *[grad_bias] * len(biases)]


def rnn(sequences, hx, weights, nonlinearity, bidirectional, rounding=EXACT):
    """Returns the outputs (L_b, directions * H), h_n like hx, and the tape for `rnn_backward`.

    `sequences` is a list of inputs (L_b, D), `hx` is (layers * directions, B, H), and `weights` is
    a flat list in the order of the parameters of `nn.RNN`.
    """
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // len(hx)
    h_n = np.zeros_like(hx)
    outputs, tape = [], []
    for b, layer_input in enumerate(sequences):
        records = []
        for k in range(0, len(hx), directions):
            states = []
            for d in range(directions):
                own = weights[(k + d) * per_direction : (k + d + 1) * per_direction]
                x = layer_input[::-1] if d else layer_input
                h = direction(x, hx[k + d, b], own, nonlinearity, rounding)
                records.append((x, hx[k + d, b], h, own))
                h_n[k + d, b] = h[-1]
                states.append(h[::-1] if d else h)
            layer_input = np.concatenate(states, -1)
        outputs.append(layer_input)
        tape.append(records)
    return outputs, h_n, tape


def rnn_backward(
    tape, hx, weights, nonlinearity, bidirectional, grad_outputs, grad_h_n, rounding=EXACT
):
    """Returns the gradients of the sequences (a list), of hx and of the weights (a list)."""
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // len(hx)
    grad_hx = np.zeros_like(hx)
    grad_weights = [np.zeros_like(w) for w in weights]
    grad_sequences = []
    hidden_size = hx.shape[-1]
    rows = sum(map(len, grad_outputs))
    for b, (records, grad) in enumerate(zip(tape, grad_outputs, strict=True)):
        for k in reversed(range(0, len(hx), directions)):
            grad_input = 0
            for d in range(directions):
                x, h0, h, own = records[k + d]
                grad_states = grad[:, d * hidden_size : (d + 1) * hidden_size]
                grad_x, grad_hx[k + d, b], own_grads = direction_backward(
                    x,
                    h0,
                    h,
                    own,
                    nonlinearity,
                    grad_states[::-1] if d else grad_states,
                    grad_h_n[k + d, b],
                    rounding,
                    rows,
                )
                grad_input = grad_input + (grad_x[::-1] if d else grad_x)
                for i, own_grad in enumerate(own_grads):
                    grad_weights[(k + d) * per_direction + i] += own_grad
            grad = grad_input
        grad_sequences.append(grad)
    return grad_sequences, grad_hx, grad_weights


def near_a_kink(tape, unit, tiny):
    """Whether rounding may move any sum z across the kink of relu at zero.

    It may if |z| is at most `unit` times the root sum of squares of its terms, which counts as at
    least `tiny`: if the input is zero, states and their rounding errors fade. An exact zero counts
    as a sum of zeros, which rounding does not change.
    """
    for records in tape:
        for x, hx, states, (weight_ih, weight_hh, *biases) in records:
            before = np.concatenate([hx[None], states[:-1]])
            z = x @ weight_ih.T + before @ weight_hh.T + sum(biases)
            squares = x**2 @ weight_ih.T**2 + before**2 @ weight_hh.T**2 + sum(b**2 for b in biases)
            near = np.abs(z) <= unit * np.maximum(np.sqrt(squares), tiny)
            if (near & np.isfinite(z) & (z != 0)).any():
                return True
    return False
