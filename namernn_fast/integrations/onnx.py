"""Exports each layer as one ONNX node for `torch.onnx.export(..., dynamo=True)`.

While that function traces a model, a layer emits torch.onnx's symbolic operator for an ONNX node
instead of this package's operators, so callers need no custom translation table. This module needs
no package except torch.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..call import Call, Results, int8
from ..cells.cell import LayerWeights, OnnxNode
from ..machine.torch_private import _disable_current_modes, called_by_dynamo


# After an error, the exporter falls back to Dynamo, which would evaluate exporting() to False, fail
# at this package's operators, and hide the first error.
@called_by_dynamo
def exporting() -> bool:
    """Returns whether torch.onnx.export is running. Slow: call it only while tracing."""
    return torch.onnx.is_in_onnx_export()


def rnn_stack(call: Call) -> Results:
    """Runs a stack of layers over whole sequences, each layer as an ONNX node.

    Output is zero past the end of a sequence, and h_n of a sequence of length 0 is its hx.

    Args:
        call: a call on padded sequences of features, with or without lengths; during an export,
            `tokens.look_up` replaces token ids with embedding rows. BATCH_INVARIANT is ignored,
            because another runtime will run the graph. With INT8, a prepared module has
            rounded the weights to 8-bit integers, and the nodes hold the integers.

    Raises:
        ValueError: input is packed or jagged, reset is given, or there is no node for projections
            or 8-bit weights.
    """
    input, weights, options = call.data, call.weights, call.options
    if call.cell.torch is None:
        raise ValueError(f"ONNX has no {call.cell.name} layer")
    node = call.cell.torch.onnx
    if options & ops.INT8 and node.int8_operator is None:
        raise ValueError(
            f"ONNX Runtime has no {node.operator} with 8-bit weights: export the layer "
            "that was prepared"
        )
    if options & (ops.PACKED | ops.JAGGED):
        kind = "PackedSequence" if options & ops.PACKED else "jagged tensor"
        raise ValueError(f"ONNX has no {kind}: export a model that takes padded input and lengths=")
    if options & ops.PROJECTIONS:
        raise ValueError("ONNX has no LSTM with projections: export a layer without proj_size")
    if call.reset is not None:
        raise ValueError(
            "ONNX has no reset: export a model that takes the pieces between resets as separate "
            "padded sequences, with lengths="
        )
    if options & ops.BATCH_FIRST:
        input = input.transpose(0, 1)
    if options & ops.INT8 and call.sequence_layout is not None:
        # Zero the padding, because the node computes one scale from all elements of its input.
        input = _zero_padding(input, call.sequence_layout)
    last_states = []
    layers = ops.layers_of(call.cell, weights, options)
    for states, layer in zip(call.states_of_layers(len(layers)), layers, strict=True):
        input, *last = _layer(call, node, input, states, layer)
        last_states.append(last)
    output = input.transpose(0, 1) if options & ops.BATCH_FIRST else input
    if len(last_states) == 1:
        return output, *last_states[0]
    return output, *map(torch.cat, zip(*last_states, strict=True))


def _layer(
    call: Call,
    node: OnnxNode,
    input: Tensor,
    states: Sequence[Tensor],
    layer: list[LayerWeights],
) -> Results:
    """Emits the ONNX node of one layer of a call and returns its results."""
    cell, lengths, options = call.cell, call.sequence_layout, call.options
    directions, hidden_size = len(layer), call.state_sizes()[0]
    attributes: dict[str, Any] = {
        "direction": "forward" if directions == 1 else "bidirectional",
        "hidden_size": hidden_size,
        **node.attributes,
    }
    if len(cell.nonlinearities) > 1:
        attributes["activations"] = ["Relu" if options & ops.RELU else "Tanh"] * directions
    seq_len, batch, _ = input.shape
    parameters = ops.parameters_of(cell, options)
    stacked = functools.partial(_stacked, gates=node.gates, size=hidden_size)
    initial: Sequence[Tensor | None] = states or [None for _ in cell.states]
    # The node takes the matrices and then the biases, both in torch's order.
    matrices, biases = (
        [[direction[p.name] for direction in layer] for p in parameters if p.is_matrix == wanted]
        for wanted in (True, False)
    )
    operator, scales = node.operator, []
    if options & ops.INT8:
        operator = str(node.int8_operator)
        quantized = [_integers(weights, stacked) for weights in matrices]
        operands = [integers for integers, _, _ in quantized]
        # None is the peephole input of the LSTM node, which torch's LSTM does not have.
        scales = [None, *itertools.chain(*((scale, zeros) for _, scale, zeros in quantized))]
    else:
        operands = [*map(stacked, matrices)]
    output, *last = torch.onnx.ops.symbolic_multi_out(
        operator,
        (
            input,
            *operands,
            torch.cat([*map(stacked, biases)], 1) if biases else None,
            None if lengths is None else lengths.clamp(min=1).to(torch.int32),
            *initial,
            *scales,
        ),
        attributes,
        dtypes=(input.dtype, *(input.dtype for _ in initial)),
        shapes=(
            (seq_len, directions, batch, hidden_size),
            *((directions, batch, hidden_size) for _ in initial),
        ),
    )
    # symbolic_multi_out returns CPU tensors, even if its inputs are on another device.
    output, last = output.to(input.device), [state.to(input.device) for state in last]
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)
    if lengths is not None:  # ONNX does not define Y past the end and for length 0
        output = _zero_padding(output, lengths)
        last = [
            state.where(lengths[:, None] > 0, 0 if first is None else first)
            for state, first in zip(last, initial, strict=True)
        ]
    return output, *last


def _zero_padding(rows: Tensor, lengths: Tensor) -> Tensor:
    """Returns `rows` (seq_len, batch, features) with zeros past the end of each sequence."""
    steps = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    return rows.where(steps < lengths[:, None], 0)


def _integers(
    weights: Sequence[Tensor], stacked: Callable[[Sequence[Tensor]], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rounded weights of all directions in the layout of the node for 8-bit weights.

    Returns three tensors: integers (directions, columns, rows) in int8, scales (directions, rows),
    and zero points (directions, rows), which are all 0.
    """
    with _disable_current_modes():  # makes them constants of the program
        pairs = [int8.quantize(weight) for weight in weights]
        integers, scales = (stacked(tensors) for tensors in zip(*pairs, strict=True))
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        return integers.transpose(1, 2).contiguous(), scales, zeros


def _stacked(weights: Sequence[Tensor], gates: Sequence[int], size: int) -> Tensor:
    """Stacks one weight or bias per direction, with its gates (`size` rows each) in ONNX order."""
    if len(gates) == 1:
        return torch.stack([*weights])
    # Use slices instead of chunks, because the exporter cannot fold a Split and would warn.
    return torch.stack(
        [torch.cat([w[size * gate : size * (gate + 1)] for gate in gates]) for w in weights]
    )
