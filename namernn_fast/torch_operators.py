"""Torch's own recurrent operators, for cells that have no fused kernel on a device.

These operators compute dense and packed sequences in one call, with cuDNN on NVIDIA GPUs. With
`lengths` or a jagged tensor, a GRU runs layer by layer and direction by direction, because a
stacked call does not return the last states of its lower layers at the end of each sequence. For an
LSTM, the sequences are packed instead.
"""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import ops
from .call import Call, Results
from .call.checks import check_reference_arguments
from .call.time_major import from_time_major, to_time_major
from .cells import NUMBERED, Cell
from .integrations.deferred import when_imported
from .machine.context import is_exporting, is_transformed
from .machine.torch_private import DYNAMO

_OPERATORS = {
    cell.number: cell.torch.operator for cell in NUMBERED if cell.torch and cell.torch.operator
}
"""torch's operators, by the number of the cell."""
_outside_of_graphs = _OPERATORS


def _break_graphs(dynamo: ModuleType) -> None:
    global _outside_of_graphs
    reason = "torch's operator would become the operators of every step in a compiled graph"
    _outside_of_graphs = {
        number: dynamo.disable(operator, reason=reason) for number, operator in _OPERATORS.items()
    }


when_imported(DYNAMO, _break_graphs, "keep torch's operators out of compiled graphs")


def _operator(cell: Cell, *tensors: Any, **settings: Any) -> Results:
    """Calls torch's operator for a cell, outside of any compiled graph.

    A compiled graph would unroll the operator into the operators of every step. Dynamo also breaks
    the graph at torch's own layers. An exported program contains the operator itself.
    """
    operators: Any = _OPERATORS if is_exporting() else _outside_of_graphs
    return operators[cell.number](*tensors, **settings)  # type: ignore[no-any-return]


def has_operator(cell: Cell) -> bool:
    """Returns whether `run_stack` computes calls of a cell on devices without a kernel."""
    return cell.torch is not None and cell.torch.operator is not None


def why_not(call: Call, tracing: bool) -> str | None:
    """Returns why torch's operators cannot compute a call, or None if they can.

    Args:
        call: a call that no fused kernel can compute.
        tracing: whether a compiler is tracing the call.
    """
    if not has_operator(call.cell):
        return "this cell runs step by step"
    if call.reset is not None:
        return "torch's operator has no reset"
    if not tracing and is_transformed():
        return "torch's operator has no rule for this transform"
    layout = call.sequence_layout
    if len(call.cell.states) > 1 and layout is not None and not is_whole(call):
        if layout.is_meta:
            return "torch's operator needs the values of the lengths, which meta tensors lack"
        if tracing:
            return "torch's operator needs the values of the lengths, which a compiler cannot see"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "reading lengths from the device would end the capture of a CUDA graph"
    return None


def run_stack(call: Call) -> Results:
    """Runs a stack of layers over whole sequences of features.

    Args:
        call: a call without reset, and without dropout unless `is_whole(call)`. The values of
            lengths on an accelerator are not checked, except for an LSTM, which reads the lengths.

    Raises:
        RuntimeError: a shape is wrong, or lengths, batch_sizes or offsets are invalid.
    """
    check_reference_arguments(call)
    layout = call.sequence_layout
    if layout is None or is_whole(call):
        return _run_whole(call)
    if len(call.cell.states) > 1:
        return _run_packed(call, layout)
    return _run_in_directions(call, layout)


def is_whole(call: Call) -> bool:
    """Returns whether torch's operator can run the whole stack; needs dense or packed input.

    On CUDA, such a call uses the weights in cuDNN's flat buffer, where nn.GRU and nn.LSTM keep
    their weights. If a call runs only one layer or direction, cuDNN copies its weights every time.
    """
    return call.sequence_layout is None or bool(call.options & ops.PACKED)


def _run_whole(call: Call) -> Results:
    """Runs a stack over dense or packed sequences in one call to torch's operator."""
    options, layout = call.options, call.sequence_layout
    # Transpose instead of passing batch_first, because oneDNN's LSTM would then return a view.
    batch_first = options & ops.BATCH_FIRST and layout is None
    data = call.data.transpose(0, 1) if batch_first else call.data
    batch = int(layout[0]) if layout is not None else data.shape[1]
    states = call.initial_states(batch)
    hx = tuple(states) if len(states) > 1 else states[0]
    weights = list(call.weights)
    settings = {
        "has_biases": bool(options & ops.BIAS),
        "num_layers": ops.layer_count(call.cell, weights, options),
        "dropout": call.dropout,
        "train": _trains(call) or call.dropout > 0,
        "bidirectional": bool(options & ops.BIDIRECTIONAL),
    }
    if layout is not None:
        return _operator(call.cell, data, layout, hx, weights, **settings)
    output, *last = _operator(call.cell, data, hx, weights, **settings, batch_first=False)
    return from_time_major(output, options, None), *last


def _trains(call: Call) -> bool:
    """Returns whether a backward pass may follow.

    cuDNN's backward pass raises an error unless its forward pass ran in training mode. Without
    dropout, the mode does not change results.
    """
    return torch.is_grad_enabled() and call.requires_grad()


def _run_packed(call: Call, layout: Tensor) -> Results:
    """Runs an LSTM with lengths or offsets by packing its sequences.

    torch's operator does not return the cell state of every step, so the last cell state cannot be
    picked out after a padded run. Packing tells the operator where each sequence ends, but needs
    the lengths on the CPU; reading them from another device synchronises with that device.
    """
    options = call.options
    lengths = (layout.diff() if options & ops.JAGGED else layout).cpu()
    padded, _, alive, places = to_time_major(call.data, layout, options)
    assert alive is not None  # the layout holds lengths or offsets
    states = call.initial_states(padded.shape[1])
    time_first = options & ~(ops.BATCH_FIRST | ops.JAGGED)
    time_major = replace(call, data=padded, states=states, sequence_layout=None, options=time_first)
    # An empty batch cannot be packed, but torch's operator takes it unpacked.
    output, *last = _run_sorted(time_major, lengths) if padded.shape[1] else _run_whole(time_major)
    output = torch.where(alive, output, 0.0)
    last = [
        torch.where(alive[0], state, initial) for state, initial in zip(last, states, strict=True)
    ]
    return from_time_major(output, options, places), *last


def _run_sorted(call: Call, lengths: Tensor) -> Results:
    """Runs an LSTM over padded sequences (seq_len, batch, features) by packing them, longest first.

    A packed sequence has at least one step. So a sequence of length 0 also runs one step, whose
    results the caller must discard.
    """
    packed = pack_padded_sequence(call.data, lengths.clamp(min=1), enforce_sorted=False)
    order, inverse = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert inverse is not None
    packed_call = replace(
        call,
        data=packed.data,
        states=[state[:, order] for state in call.states],
        sequence_layout=packed.batch_sizes,
        options=call.options | ops.PACKED,
    )
    output, *last = _run_whole(packed_call)
    output, _ = pad_packed_sequence(packed._replace(data=output), total_length=call.data.shape[0])
    return output, *(states[:, inverse] for states in last)


def _run_in_directions(call: Call, layout: Tensor) -> Results:
    """Runs a stack over sequences with lengths or offsets, one layer and direction at a time.

    Lengths are not copied to the CPU. With the offsets of a jagged tensor on a device, this
    function synchronises with that device.
    """
    options = call.options
    jagged = options & ops.JAGGED
    input, _, alive, places = to_time_major(call.data, layout, options)
    assert alive is not None  # the layout holds lengths or offsets
    lengths = layout.diff() if jagged else layout
    steps = torch.arange(input.shape[0], device=input.device)[:, None, None]
    # Maps each step of a reversed sequence to its original step. Padding stays in place.
    mirror = torch.where(alive, lengths[:, None] - 1 - steps, steps)
    (states,) = call.initial_states(input.shape[1])
    settings = {
        "has_biases": bool(options & ops.BIAS),
        "num_layers": 1,
        "dropout": 0.0,
        "train": _trains(call),
        "bidirectional": False,
        "batch_first": False,
    }
    last_states: list[Tensor] = []
    for layer in ops.layers_of(call.cell, call.weights, options):
        outputs = []
        for direction, layer_weights in enumerate(layer):
            hx = states[len(last_states)]
            output = input if direction == 0 else _along_time(input, mirror)
            weights = [*layer_weights.values()]
            output, _ = _operator(call.cell, output, hx.unsqueeze(0), weights, **settings)
            last = _along_time(output, (lengths - 1).clamp(min=0)[None, :, None]).squeeze(0)
            last_states.append(torch.where(lengths[:, None] > 0, last, hx))
            output = output if direction == 0 else _along_time(output, mirror)
            outputs.append(torch.where(alive, output, 0.0))
        input = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return from_time_major(input, options, places), torch.stack(last_states)


def _along_time(rows: Tensor, steps: Tensor) -> Tensor:
    """Returns rows[steps[t, b], b] for each t and b.

    Args:
        rows: (seq_len, batch, features).
        steps: (any length, batch, 1).
    """
    return rows.gather(0, steps.expand(-1, -1, rows.shape[-1]))
