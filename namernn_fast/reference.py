"""The recurrence in ATen operators, step by step.

This path runs on devices and in dtypes without a fused kernel, and in the double backward of the
fused operators. Its results can be differentiated any number of times.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from . import ops
from .call import Call, Results
from .call.options import nonlinearity_of
from .call.time_major import from_time_major, to_time_major
from .cells.cell import Step
from .machine.context import is_compiling, is_transformed

PLAIN = Tensor, torch.nn.Parameter
"""The classes of tensors whose memory holds their values, unless they are lazily negated."""


def run_stack(call: Call) -> Results:
    """Runs a stack of layers over whole sequences, in one or two directions.

    Args:
        call: a call without dropout. Lengths may be on any device; on an accelerator their values
            are not checked. LAST_STATE and SHARE_PREFIXES are ignored.
    """
    cell, weights, reset, options = call.cell, call.weights, call.reset, call.options
    input, batch_sizes, alive, places = to_time_major(call.data, call.sequence_layout, options)
    batch_first = options & ops.BATCH_FIRST
    if reset is not None:
        reset = (reset.transpose(0, 1) if batch_first else reset).unsqueeze(-1)
    recorded = is_transformed() or is_compiling()
    batch = batch_sizes[0] if batch_sizes else input.shape[1]
    states = call.initial_states(batch)
    in_place = (
        cell.sums_become_states
        and not options & ops.SUMS
        and not (recorded or torch.is_grad_enabled())
        # An in-place operator on a plain tensor cannot return a wrapper subclass.
        and all(type(t) in PLAIN for t in (input, *weights, *states, *call.restart_states))
    )
    initial = states[0] if len(states) == 1 else torch.cat([*states], -1)
    restart = torch.cat([*call.restart_states], -1).unbind(1) if call.restart_states else None
    sizes = call.state_sizes()

    hidden_size = call.hidden_size()
    beside = [to_time_major(rows, call.sequence_layout, options)[0] for rows in call.beside]
    last_states: list[Tensor] = []
    for layer in ops.layers_of(cell, weights, options):
        outputs = []
        for direction, layer_weights in enumerate(layer):
            bias = cell.bias_of_input(layer_weights)
            if options & ops.SUMS:
                sums = input.chunk(ops.directions_of(options), -1)[direction]
                sums = sums if bias is None else sums + bias
            else:
                sums = _project(input, layer_weights["weight_ih"], bias, in_place)
            if beside:
                place = hidden_size, len(last_states), initial.shape[0]
                of_layer = (
                    i.part_of(rows, *place) for i, rows in zip(cell.inputs, beside, strict=True)
                )
                sums = torch.cat([sums, *of_layer], -1)
            hidden, last = _direction(
                sums.unbind(0) if batch_sizes is None else sums.split_with_sizes(batch_sizes),
                batch_sizes,
                initial[len(last_states)],
                cell.make_step(
                    layer_weights, nonlinearity=nonlinearity_of(options), in_place=in_place
                ),
                alive,
                reset,
                restart[len(last_states)] if restart else None,
                reverse=direction == 1,
            )
            if alive is not None:
                output = torch.where(alive, torch.stack(hidden), 0.0)
            elif in_place:
                output = sums
            else:
                output = torch.stack(hidden) if batch_sizes is None else torch.cat(hidden)
            outputs.append(output if len(states) == 1 else _own(output[..., : sizes[0]]))
            last_states.append(last)
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    input = from_time_major(input, options, places)
    last = torch.stack(last_states)
    # Slice instead of `split`, which would run the hooks of both states if the loss uses only one.
    starts = itertools.accumulate(sizes, initial=0)
    parts = [last.narrow(-1, *place) for place in zip(starts, sizes, strict=False)]
    return input, *([last] if len(states) == 1 else map(_own, parts))


def _own(result: Tensor) -> Tensor:
    """Returns a result that may be modified in place, unlike a view made under no_grad."""
    return result if torch.is_grad_enabled() else result.clone()


def _project(input: Tensor, weight_ih: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    """Returns x_t W_ih^T + bias for all steps.

    Args:
        input: (seq_len, batch, features), or the data of a PackedSequence (rows, features); or
            token ids without the last dimension.
        weight_ih: the weight of one direction, or its table if input holds token ids.
        bias: the result of `Cell.bias_of_input`.
        in_place: whether the steps overwrite the result, which then becomes the output. If so, the
            result must not be a view: a view made under no_grad cannot be modified in place later.
    """
    if ops.has_ids(input):
        return _rows_of_table(input, weight_ih, bias, in_place)
    if not in_place or input.dim() == 2:
        return linear(input, weight_ih, bias)
    sums = linear(input.flatten(0, 1), weight_ih, bias)
    return sums.resize_(*input.shape[:-1], sums.shape[1])  # unflatten would return a view


def _rows_of_table(ids: Tensor, table: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    """Computes `_project` for token ids: returns the rows of `table` at `ids`, plus the bias."""
    if in_place and ids.dim() == 2:
        sums = table.index_select(0, ids.flatten()).resize_(*ids.shape, table.shape[1])
        return sums if bias is None else sums.add_(bias)
    # Gather in float32, so that the gradient of a 16-bit table is summed in float32.
    rows = embedding(ids, table if table.dtype.itemsize > 2 else table.float())
    return (rows if bias is None else rows + bias).to(table.dtype)


def _direction(
    sums: Sequence[Tensor],
    batch_sizes: list[int] | None,
    hx: Tensor,
    step: Step,
    alive: Tensor | None,
    reset: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
) -> tuple[list[Tensor], Tensor]:
    """Runs the recurrence of one direction of one layer.

    Args:
        sums: for each time step, its rows of the result of `_project`, (sequences, gates *
            hidden_size), followed by `Cell.inputs` if there are any.
        batch_sizes: the number of sequences at each time step, or None if it is constant.
        hx: the initial states, concatenated along the features: (batch, features).
        step: the function that computes one step of the cell.
        alive: None, or bool (seq_len, batch, 1): True before the end of each padded sequence.
        reset: None, or bool (seq_len, batch, 1): True where the state restarts.
        restart: the states to restart from, concatenated like hx: (seq_len, batch, features). None
            for zeros.
        reverse: whether to run from the last time step to the first.

    Returns:
        The states at each time step, in the order of `sums`, and the last state of each sequence.
        Steps past the end of a padded sequence leave its state unchanged.
    """
    steps = len(sums)
    sizes = [hx.shape[0]] * steps if batch_sizes is None else batch_sizes
    previous_sequences = sizes[-1 if reverse else 0]  # the number of sequences at the previous step
    h = hx if previous_sequences == hx.shape[0] else hx[:previous_sequences]
    ended = []  # last states of the sequences that have ended, shortest sequences first
    hidden = []
    for t in reversed(range(steps)) if reverse else range(steps):
        sequences = sizes[t]
        if sequences < previous_sequences:
            ended.append(h[sequences:])
            h = h[:sequences]
        # A reset at `boundary` cuts step t off from its previous state.
        boundary = t + 1 if reverse else t
        if reset is not None and boundary < steps:
            cut = reset[boundary, : h.shape[0]]
            start = 0.0 if restart is None else restart[t, : h.shape[0]]
            h = torch.where(cut if alive is None else cut & alive[boundary], start, h)
        if sequences > previous_sequences:
            h = torch.cat([h, hx[previous_sequences:sequences]])
        previous_sequences = sequences
        h_new = step(sums[t], h)
        h = h_new if alive is None else torch.where(alive[t], h_new, h)
        hidden.append(h)
    if reverse:
        hidden.reverse()
    return hidden, torch.cat([h, *reversed(ended)]) if ended else h
