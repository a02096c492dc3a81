"""The recurrence in ATen operators: oracle, path of every other device and dtype, double backward.

Differentiable as often as one likes, on every device that has matrix products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops


def rnn_stack(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    rows: Tensor | None,
    reset: Tensor | None,
    options: int,
) -> tuple[Tensor, Tensor]:
    """A stack of layers over whole sequences; arguments and results as in `namernn_fast.ops`.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), the second direction from the end.
    lengths may be on any device; the values of those on an accelerator are not checked.
    """
    padded, lengths = not options & (ops.PACKED | ops.JAGGED), rows
    batch_first = bool(options & ops.BATCH_FIRST)
    places = alive = None
    if options & ops.JAGGED:
        assert rows is not None
        lengths, places = rows.diff(), _rows_of_jagged(rows)
        longest = max([1, *lengths.tolist()])
        input = input.new_zeros(len(lengths), longest, input.shape[-1]).index_put(places, input)
        padded = batch_first = True
    if batch_first:
        input = input.transpose(0, 1) if padded else input
        reset = None if reset is None else reset.transpose(0, 1)
    if not padded:
        assert rows is not None
        xs = list(input.split(rows.tolist()))
    else:
        if lengths is not None:
            steps = torch.arange(input.shape[0], device=lengths.device)
            alive = (steps[:, None] < lengths).unsqueeze(-1)
            input = torch.where(alive, input, 0.0)  # padding is not to reach a gradient as NaN
        xs = list(input.unbind(0))
    directions = ops.directions_of(options)
    per_direction = ops.weights_per_layer(options) // directions
    activation = torch.relu if options & ops.RELU else torch.tanh
    num_states = len(weights) // per_direction
    if hx is None:
        hx = input.new_zeros(num_states, xs[0].shape[0], weights[1].shape[0])
    cuts = [None] * len(xs) if reset is None else list(reset.unsqueeze(-1).unbind(0))

    states = []
    for state in range(0, num_states, directions):
        outputs = []
        for d in range(directions):
            first = (state + d) * per_direction
            own = weights[first : first + per_direction]
            hidden, h_n = _direction(
                xs, hx[state + d], own, activation, alive, cuts, reverse=d == 1
            )
            outputs.append(hidden)
            states.append(h_n)
        xs = (
            outputs[0]
            if directions == 1
            else [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
        )
    h_n = torch.stack(states)
    if not padded:
        return torch.cat(xs), h_n
    output = torch.stack(xs, 1 if batch_first else 0)
    return (output if places is None else output[places]), h_n


def _rows_of_jagged(offsets):
    """For each row of a jagged tensor the number of its sequence and its place there."""
    row = torch.arange(int(offsets[-1]), device=offsets.device)
    sequence = torch.bucketize(row, offsets[1:], right=True)
    return sequence, row - offsets[sequence]


def _direction(xs, hx, weights, activation, alive, cuts, reverse):
    """One direction of one layer: the states at each time, in the order of `xs`, and the last."""
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    h = hx[: xs[-1 if reverse else 0].shape[0]]
    ended = []  # last states of the sequences that have ended, shortest first
    hidden = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        rows = xs[t].shape[0]
        if rows < h.shape[0]:
            ended.append(h[rows:])
            h = h[:rows]
        border = t + 1 if reverse else t  # which a state crosses to reach t
        if border < len(xs) and cuts[border] is not None:
            cut = cuts[border][: h.shape[0]]
            h = torch.where(cut if alive is None else cut & alive[border], 0.0, h)
        if rows > h.shape[0]:
            h = torch.cat([h, hx[h.shape[0] : rows]])
        z = torch.nn.functional.linear(xs[t], weight_ih, bias_ih)
        new = activation(z + torch.nn.functional.linear(h, weight_hh, bias_hh))
        if alive is None:
            h = new
            hidden.append(h)
        else:
            h = torch.where(alive[t], new, h)
            hidden.append(torch.where(alive[t], new, 0.0))
    if reverse:
        hidden.reverse()
    return hidden, torch.cat([h, *reversed(ended)])
