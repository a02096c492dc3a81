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
from .call import Call
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


def why_not(call: Call, tracing: bool) -> str | None:
    """Returns why torch's operators cannot compute a call, or None if they can."""
    if call.cell == "rnn":
        return "the vanilla cell runs step by step"
    if call.reset is not None:
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
    if layout is not None and options & ops.JAGGED:
        return _run_jagged(call, layout)
    if layout is not None and not options & ops.PACKED:
        return _run_padded(call, layout)
    batch = int(layout[0]) if layout is not None else call.data.shape[_batch_dim(options)]
    hx = _initial_states(call, batch)
    shape = bool(options & ops.BIAS), ops.layer_count(call.weights, options), 0.0, _trains(call)
    bidirectional = bool(options & ops.BIDIRECTIONAL)
    weights = list(call.weights)
    if layout is not None:
        return _gru(call.data, layout, hx, weights, *shape, bidirectional)
    batch_first = bool(options & ops.BATCH_FIRST)
    return _gru(call.data, hx, weights, *shape, bidirectional, batch_first)


def _batch_dim(options: int) -> int:
    return 0 if options & ops.BATCH_FIRST else 1


def _initial_states(call: Call, batch: int) -> Tensor:
    if call.hx is not None:
        return call.hx
    states = ops.layer_count(call.weights, call.options) * ops.directions_of(call.options)
    return call.weights[0].new_zeros(states, batch, ops.hidden_size_of(call.weights))


def _trains(call: Call) -> bool:
    """Returns whether a backward pass may follow.

    After a forward pass in inference mode, that of cuDNN is an error. Without dropout the mode
    changes no result.
    """
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (call.data, call.hx, *call.weights)
    )


def _run_padded(call: Call, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`run_stack` for padded sequences with lengths, which it reads on their device alone."""
    options = call.options
    batch_first = options & ops.BATCH_FIRST
    input = call.data.transpose(0, 1) if batch_first else call.data
    steps = torch.arange(input.shape[0], device=input.device)[:, None]
    alive = (steps < lengths)[:, :, None]
    input = torch.where(alive, input, 0.0)  # NaN in padding must not reach a gradient
    # The step of the reversed sequence that each step holds; padding stays where it is.
    mirror = torch.where(alive, (lengths - 1 - steps)[:, :, None], steps[:, :, None])
    states = _initial_states(call, input.shape[1])
    last_states: list[Tensor] = []
    for layer in ops.layers_of(call.weights, options):
        outputs = []
        for direction, own in enumerate(layer):
            hx = states[len(last_states)]
            output = input if direction == 0 else _along_time(input, mirror)
            weights = [weight for weight in own if weight is not None]
            bias = bool(options & ops.BIAS)
            output, _ = _gru(
                output, hx.unsqueeze(0), weights, bias, 1, 0.0, _trains(call), False, False
            )
            last = _along_time(output, (lengths - 1).clamp(min=0)[None, :, None]).squeeze(0)
            last_states.append(torch.where(lengths[:, None] > 0, last, hx))
            output = output if direction == 0 else _along_time(output, mirror)
            outputs.append(torch.where(alive, output, 0.0))
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return reference.with_batch_first(input) if batch_first else input, torch.stack(last_states)


def _along_time(rows: Tensor, steps: Tensor) -> Tensor:
    """Returns rows[steps[t, b], b] for each t and b.

    Args:
        rows: (seq_len, batch, features).
        steps: (any length, batch, 1).
    """
    return rows.gather(0, steps.expand(-1, -1, rows.shape[-1]))


def _run_jagged(call: Call, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """`run_stack` for the values of a jagged tensor. Waits for the device, to find the longest."""
    lengths, places = offsets.diff(), reference.places_of_jagged(offsets)
    longest = max([1, *lengths.tolist()])
    padded = call.data.new_zeros(longest, len(lengths), *call.data.shape[1:])
    padded = padded.index_put(places, call.data)
    options = call.options & ~(ops.JAGGED | ops.BATCH_FIRST)
    output, h_n = _run_padded(
        Call(padded, call.hx, call.weights, lengths, None, options, cell=call.cell), lengths
    )
    return output[places], h_n
