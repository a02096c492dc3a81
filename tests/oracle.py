"""An RNN in NumPy, one sequence at a time, with back-propagation through time written by hand.

It shares nothing with the library. Arrays of float64 or longdouble keep their precision.
"""

import numpy as np

ACTIVATIONS = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}
# Derivatives in terms of h = act(z). The derivative of relu at NaN is 1, as in torch.
DERIVATIVES = {"tanh": lambda h: 1 - h * h, "relu": lambda h: 1 - (h <= 0).astype(h.dtype)}


def unchanged(values):
    return values


def direction(x, h, weights, nonlinearity, nudge):
    """Returns the states (L, H) for an input x (L, D) and an initial state h (H)."""
    weight_ih, weight_hh, *biases = weights
    states = []
    for x_t in x:
        h = nudge(ACTIVATIONS[nonlinearity](weight_ih @ x_t + weight_hh @ h + sum(biases)))
        states.append(h)
    return np.array(states)


def direction_backward(x, hx, states, weights, nonlinearity, grad_states, grad_last, nudge):
    """Returns gradients of x, hx and weights from those of all states and of the last state."""
    weight_ih, weight_hh, *biases = weights
    grad_x = np.zeros_like(x)
    grad_ih, grad_hh = np.zeros_like(weight_ih), np.zeros_like(weight_hh)
    grad_bias = np.zeros_like(weight_hh[0])
    grad_h = grad_last
    for t in reversed(range(len(x))):
        dz = nudge((grad_h + grad_states[t]) * DERIVATIVES[nonlinearity](states[t]))
        grad_x[t] = dz @ weight_ih
        grad_ih += np.outer(dz, x[t])
        grad_hh += np.outer(dz, states[t - 1] if t else hx)
        grad_bias += dz
        grad_h = dz @ weight_hh
    return grad_x, grad_h, [grad_ih, grad_hh, *[grad_bias] * len(biases)]


def rnn(sequences, hx, weights, nonlinearity, bidirectional, nudge=unchanged):
    """Forward for a list of sequences (L_b, D), hx (layers * directions, B, H), flat weights.

    `nudge` is what happens to every state, and in the backward pass to its gradient before act.
    Returns the outputs (L_b, directions * H), h_n like hx, and what `rnn_backward` needs.
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
                h = direction(x, hx[k + d, b], own, nonlinearity, nudge)
                records.append((x, hx[k + d, b], h, own))
                h_n[k + d, b] = h[-1]
                states.append(h[::-1] if d else h)
            layer_input = np.concatenate(states, -1)
        outputs.append(layer_input)
        tape.append(records)
    return outputs, h_n, tape


def rnn_backward(
    tape, hx, weights, nonlinearity, bidirectional, grad_outputs, grad_h_n, nudge=unchanged
):
    """Returns the gradients of the sequences (a list), of hx and of the weights (a list)."""
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // len(hx)
    grad_hx = np.zeros_like(hx)
    grad_weights = [np.zeros_like(w) for w in weights]
    grad_sequences = []
    hidden_size = hx.shape[-1]
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
                    nudge,
                )
                grad_input = grad_input + (grad_x[::-1] if d else grad_x)
                for i, own_grad in enumerate(own_grads):
                    grad_weights[(k + d) * per_direction + i] += own_grad
            grad = grad_input
        grad_sequences.append(grad)
    return grad_sequences, grad_hx, grad_weights


def near_a_kink(tape, unit, tiny):
    """Whether rounding may put any z on the other side of a kink of relu at zero.

    That is where |z| is within `unit` of what the terms of its sum come to, their root sum of
    squares and no less than `tiny`: states fade where the input is zero, and rounding with them.
    Zero itself comes of zeros alone, and that without rounding.
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
