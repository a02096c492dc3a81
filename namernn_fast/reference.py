"""The recurrence in ATen operators: oracle, path of every other device and dtype, double backward.

Differentiable as often as one likes, on every device that has matrix products.
"""

import torch
from torch import Tensor

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    nonlinearity: str,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """One layer over the whole sequence; arguments and results as in `namernn_fast.ops`.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), the second direction from the end.
    """
    if batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    steps = list(input.unbind(0) if batch_sizes is None else input.split(batch_sizes.tolist()))
    directions = 2 if bidirectional else 1
    if hx is None:
        hx = input.new_zeros(directions, steps[0].shape[0], weights[1].shape[0])

    per_direction = len(weights) // directions
    outputs, states = [], []
    for d in range(directions):
        own = weights[d * per_direction : (d + 1) * per_direction]
        hidden, h_n = _direction(steps, hx[d], own, ACTIVATIONS[nonlinearity], reverse=d == 1)
        outputs.append(torch.stack(hidden) if batch_sizes is None else torch.cat(hidden))
        states.append(h_n)
    output = torch.cat(outputs, -1)
    return output.transpose(0, 1) if batch_first and batch_sizes is None else output, torch.stack(
        states
    )


def _direction(steps, hx, weights, activation, reverse):
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    h = hx[: steps[-1 if reverse else 0].shape[0]]
    ended = []  # last states of the sequences that have ended, shortest first
    hidden = []
    for x in reversed(steps) if reverse else steps:
        alive = x.shape[0]
        if alive < h.shape[0]:
            ended.append(h[alive:])
            h = h[:alive]
        elif alive > h.shape[0]:
            h = torch.cat([h, hx[h.shape[0] : alive]])
        h = activation(
            torch.nn.functional.linear(x, weight_ih, bias_ih)
            + torch.nn.functional.linear(h, weight_hh, bias_hh)
        )
        hidden.append(h)
    if reverse:
        hidden.reverse()
    return hidden, torch.cat([h, *reversed(ended)])
