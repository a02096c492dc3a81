"""The recurrence in ATen operators, step by step.

It is the path of every device and dtype that no kernel takes, and the double backward of the fused
operators. Differentiable as often as one likes, on every device that has matrix products.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops


def rnn_stack(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    sequence_layout: Tensor | None,
    reset: Tensor | None,
    options: int,
) -> tuple[Tensor, Tensor]:
    """Runs a stack of layers over whole sequences.

    h_t = act(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh), the second direction from the end.

    Args:
        input, hx, weights, sequence_layout, reset, options: as of `namernn_fast.ops`; lengths may
            be on any device; their values on an accelerator are not checked.

    Returns:
        output and h_n.
    """
    batch_first, alive, places = bool(options & ops.BATCH_FIRST), None, None
    if options & ops.PACKED:
        assert sequence_layout is not None
        xs = list(input.split(sequence_layout.tolist()))
    else:
        lengths = sequence_layout
        if options & ops.JAGGED:
            assert sequence_layout is not None
            lengths, places = sequence_layout.diff(), _places_of_jagged(sequence_layout)
            longest = max([1, *lengths.tolist()])
            input = input.new_zeros(len(lengths), longest, input.shape[-1]).index_put(places, input)
            batch_first = True
        input = input.transpose(0, 1) if batch_first else input
        if lengths is not None:
            steps = torch.arange(input.shape[0], device=lengths.device)
            alive = (steps[:, None] < lengths).unsqueeze(-1)
            input = torch.where(alive, input, 0.0)  # NaN in padding must not reach a gradient
        xs = list(input.unbind(0))
    if reset is not None:
        reset = reset.transpose(0, 1) if batch_first else reset
    cuts = [None] * len(xs) if reset is None else reset.unsqueeze(-1).unbind(0)
    activation = torch.relu if options & ops.RELU else torch.tanh
    layers = ops.layers_of(weights, options)
    if hx is None:
        states = len(layers) * ops.directions_of(options)
        hx = input.new_zeros(states, xs[0].shape[0], weights[1].shape[0])

    last_states: list[Tensor] = []
    for layer in layers:
        outputs = []
        for direction, own in enumerate(layer):
            hidden, h_n = _direction(
                xs, hx[len(last_states)], own, activation, alive, cuts, reverse=direction == 1
            )
            outputs.append(hidden)
            last_states.append(h_n)
        one = len(outputs) == 1
        xs = outputs[0] if one else [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
    h_n = torch.stack(last_states)
    if options & ops.PACKED:
        return torch.cat(xs), h_n
    output = torch.stack(xs, 1 if batch_first else 0)
    return (output if places is None else output[places]), h_n


def _places_of_jagged(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each row of a jagged tensor the number of its sequence and its time."""
    row = torch.arange(int(offsets[-1]), device=offsets.device)
    sequence = torch.bucketize(row, offsets[1:], right=True)
    return sequence, row - offsets[sequence]


def _direction(
    xs: list[Tensor],
    hx: Tensor,
    weights: ops.LayerWeights,
    activation: Callable[[Tensor], Tensor],
    alive: Tensor | None,
    cuts: Sequence[Tensor | None],
    reverse: bool,
) -> tuple[list[Tensor], Tensor]:
    """Runs one direction of one layer.

    Args:
        xs: for each time the input rows (sequences, features); their number may decrease.
        hx: (batch, hidden_size)
        weights: of this direction.
        activation: tanh or relu.
        alive: bool (seq_len, batch, 1), the steps before the end of each padded sequence; or None.
        cuts: for each time where a state begins anew, bool (sequences, 1), or None.
        reverse: whether to run from the last time to the first.

    Returns:
        The states at each time, in the order of `xs`, and the last state of each sequence.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    h = hx[: xs[-1 if reverse else 0].shape[0]]
    ended = []  # last states of the sequences that have ended, shortest sequences first
    hidden = []
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        sequences = xs[t].shape[0]
        if sequences < h.shape[0]:
            ended.append(h[sequences:])
            h = h[:sequences]
        border = t + 1 if reverse else t  # which a state crosses to reach t
        cut = cuts[border] if border < len(xs) else None
        if cut is not None:
            cut = cut[: h.shape[0]]
            h = torch.where(cut if alive is None else cut & alive[border], 0.0, h)
        if sequences > h.shape[0]:
            h = torch.cat([h, hx[h.shape[0] : sequences]])
        new = activation(linear(xs[t], weight_ih, bias_ih) + linear(h, weight_hh, bias_hh))
        if alive is None:
            h = new
            hidden.append(h)
        else:
            h = torch.where(alive[t], new, h)
            hidden.append(torch.where(alive[t], new, 0.0))
    if reverse:
        hidden.reverse()
    return hidden, torch.cat([h, *reversed(ended)])
