"""Torch's own recurrent operators, for cells that have no fused kernel on a device.

They compute dense and packed sequences in one call, with cuDNN on NVIDIA GPUs. `lengths` and jagged
tensors run layer by layer and direction by direction, because a stacked call does not return the
last states of its lower layers at the end of each sequence.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .call import Call, Cell
from .checks import check_reference_arguments
from .integrations.deferred import when_imported

_outside_of_graphs: Any = torch.gru


def _break_graphs(dynamo: ModuleType) -> None:
    global _outside_of_graphs
    reason = "torch.gru would become the operators of every step in a compiled graph"
    _outside_of_graphs = dynamo.disable(torch.gru, reason=reason)


when_imported("torch._dynamo", _break_graphs)


def _gru(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Calls `torch.gru`, outside of a compiled graph, which would unroll it.

    Dynamo breaks the graph at `nn.GRU` as well. An exported program holds the operator.
    """
    run = torch.gru if torch.compiler.is_exporting() else _outside_of_graphs
    return run(*arguments)


def why_not(cell: Cell, reset: Tensor | None, tracing: bool) -> str | None:
    """Returns why torch's operators cannot compute a call, or None if they can.

    Args:
        cell, reset: of the call.
        tracing: whether a compiler is tracing the call.
    """
    if cell == "rnn":
        return "the vanilla cell runs step by step"
    if reset is not None:
        return "torch's operator has no reset"
    if not tracing and reference.is_transformed():
        return "torch's operator has no rule for this transform"
    return None


def run_stack(call: Call) -> tuple[Tensor, Tensor]:
    """Runs a stack of layers over whole sequences of features.

    Args:
        call: without dropout and reset. The values of lengths on an accelerator are not checked.

    Returns:
        output and h_n.

    Raises:
        RuntimeError: a shape is wrong, or lengths, batch_sizes or offsets are impossible.
    """
    check_reference_arguments(call)
    options, layout = call.options, call.sequence_layout
    if layout is not None and not options & ops.PACKED:
        return _run_in_directions(call, layout)
    batch_first = bool(options & ops.BATCH_FIRST)
    batch = int(layout[0]) if layout is not None else call.data.shape[0 if batch_first else 1]
    hx = ops.zero_states(call.weights, options, batch) if call.hx is None else call.hx
    shape = bool(options & ops.BIAS), ops.layer_count(call.weights, options), 0.0, _trains(call)
    bidirectional = bool(options & ops.BIDIRECTIONAL)
    weights = list(call.weights)
    if layout is not None:
        return _gru(call.data, layout, hx, weights, *shape, bidirectional)
    return _gru(call.data, hx, weights, *shape, bidirectional, batch_first)


def _trains(call: Call) -> bool:
    """Returns whether a backward pass may follow.

    After a forward pass in inference mode, that of cuDNN is an error. Without dropout the mode
    changes no result.
    """
    return torch.is_grad_enabled() and call.requires_grad()


def _run_in_directions(call: Call, layout: Tensor) -> tuple[Tensor, Tensor]:
    """`run_stack` for sequences with lengths or offsets, one layer and direction at a time.

    Lengths are read on their device alone. Offsets of a jagged tensor make it wait for the device.
    """
    options = call.options
    jagged = options & ops.JAGGED
    input, _, alive, places = reference.with_time_first(call.data, layout, options)
    assert alive is not None  # the layout is that of padded or jagged sequences
    lengths = layout.diff() if jagged else layout
    steps = torch.arange(input.shape[0], device=input.device)[:, None, None]
    # The step of the reversed sequence that each step holds; padding stays where it is.
    mirror = torch.where(alive, lengths[:, None] - 1 - steps, steps)
    states = call.hx
    if states is None:
        states = ops.zero_states(call.weights, options, input.shape[1])
    arguments = bool(options & ops.BIAS), 1, 0.0, _trains(call), False, False
    last_states: list[Tensor] = []
    for layer in ops.layers_of(call.weights, options):
        outputs = []
        for direction, own in enumerate(layer):
            hx = states[len(last_states)]
            output = input if direction == 0 else _along_time(input, mirror)
            weights = [weight for weight in own if weight is not None]
            output, _ = _gru(output, hx.unsqueeze(0), weights, *arguments)
            last = _along_time(output, (lengths - 1).clamp(min=0)[None, :, None]).squeeze(0)
            last_states.append(torch.where(lengths[:, None] > 0, last, hx))
            output = output if direction == 0 else _along_time(output, mirror)
            outputs.append(torch.where(alive, output, 0.0))
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    if places is not None:
        input = input[places]
    elif options & ops.BATCH_FIRST:
        input = reference.with_batch_first(input)
    return input, torch.stack(last_states)


def _along_time(rows: Tensor, steps: Tensor) -> Tensor:
    """Returns rows[steps[t, b], b] for each t and b.

    Args:
        rows: (seq_len, batch, features).
        steps: (any length, batch, 1).
    """
    return rows.gather(0, steps.expand(-1, -1, rows.shape[-1]))
