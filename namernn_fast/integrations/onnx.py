"""ONNX: exports each layer as one node for `torch.onnx.export(..., dynamo=True)`.

While that function traces a model, a layer emits torch.onnx's symbolic operator for an ONNX node
instead of this package's operators, so that callers need no custom translation table. This module
needs no package except torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..call import Call, Results


def exporting() -> bool:
    """Returns whether torch.onnx.export is running. Slow: call it only while tracing."""
    return torch.onnx.is_in_onnx_export()


# Dynamo would evaluate exporting() to False. The exporter falls back to Dynamo after an error, and
# would then fail at this package's operators and hide that error. This attribute is what the
# decorator torch.compiler.assume_constant_result sets, but without importing Dynamo.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rnn_stack(call: Call) -> Results:
    """Runs a stack of layers over whole sequences, each layer as an ONNX node.

    Output is zero past the end of a sequence, and h_n of a sequence of length 0 is its hx.

    Args:
        call: padded sequences of features, with or without lengths; during an export
            `tokens.look_up` has replaced token ids by their rows. BATCH_INVARIANT is ignored,
            because another runtime will run the graph.

    Raises:
        ValueError: input is packed or jagged, or reset is given.
    """
    input, weights, options = call.data, call.weights, call.options
    if options & (ops.PACKED | ops.JAGGED):
        kind = "PackedSequence" if options & ops.PACKED else "jagged tensor"
        raise ValueError(f"ONNX has no {kind}: export a model that takes padded input and lengths=")
    if call.reset is not None:
        raise ValueError(
            "ONNX has no reset: export a model that takes the pieces between resets as separate "
            "padded sequences, with lengths="
        )
    if options & ops.BATCH_FIRST:
        input = input.transpose(0, 1)
    states = []
    for own_hx, own_cx, layer in zip(
        ops.states_of_layers(call.hx, weights, options),
        ops.states_of_layers(call.cx, weights, options),
        ops.layers_of(weights, options),
        strict=True,
    ):
        input, *last = _layer(call, input, own_hx, own_cx, layer)
        states.append(last)
    output = input.transpose(0, 1) if options & ops.BATCH_FIRST else input
    return output, *(states[0] if len(states) == 1 else map(torch.cat, zip(*states, strict=True)))


def _layer(
    call: Call,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    layer: list[ops.LayerWeights],
) -> Results:
    """Emits the ONNX node of one layer of a call and returns its results."""
    lengths, options = call.sequence_layout, call.options
    directions = len(layer)
    weights_ih, weights_hh, biases_ih, biases_hh = zip(*layer, strict=True)
    attributes: dict[str, Any] = {
        "direction": "forward" if directions == 1 else "bidirectional",
        "hidden_size": ops.hidden_size_of(call.weights),
    }
    if call.cell == "gru":
        attributes["linear_before_reset"] = 1  # as torch: the reset gate scales W_hn h + b_hn
    elif call.cell == "rnn":
        attributes["activations"] = ["Relu" if options & ops.RELU else "Tanh"] * directions
    seq_len, batch, _ = input.shape
    hidden_size = ops.hidden_size_of(call.weights)
    states = (hx, cx) if call.cell == "lstm" else (hx,)
    output, *last = torch.onnx.ops.symbolic_multi_out(
        call.cell.upper(),
        (
            input,
            _stacked(weights_ih, call),
            _stacked(weights_hh, call),
            torch.cat([_stacked(biases_ih, call), _stacked(biases_hh, call)], 1)
            if options & ops.BIAS
            else None,
            None if lengths is None else lengths.clamp(min=1).to(torch.int32),
            *states,
        ),
        attributes,
        dtypes=(input.dtype, *(input.dtype for _ in states)),
        shapes=(
            (seq_len, directions, batch, hidden_size),
            *((directions, batch, hidden_size) for _ in states),
        ),
    )
    # symbolic_multi_out returns CPU tensors, whatever the device of its inputs is.
    output, last = output.to(input.device), [state.to(input.device) for state in last]
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)
    if lengths is not None:  # ONNX leaves Y past the end, and sequences of length 0, undefined
        steps = torch.arange(seq_len, device=input.device)[:, None, None]
        output = output.where(steps < lengths[:, None], 0)
        last = [
            of_last.where(lengths[:, None] > 0, 0 if initial is None else initial)
            for of_last, initial in zip(last, states, strict=True)
        ]
    return output, *last


def _stacked(weights: Sequence[Tensor], call: Call) -> Tensor:
    """Stacks a kind of weight or bias of all directions, with the gates in the order of ONNX.

    That of a GRU is z, r, n in ONNX; torch has r, z, n. That of an LSTM is i, o, f, g; torch has
    i, f, g, o.
    """
    if call.cell == "rnn":
        return torch.stack([*weights])
    size = ops.hidden_size_of(call.weights)
    order = (1, 0, 2) if call.cell == "gru" else (0, 3, 1, 2)
    # Slices instead of chunks: the exporter cannot evaluate Split in advance, and warns about each.
    return torch.stack(
        [torch.cat([w[size * gate : size * (gate + 1)] for gate in order]) for w in weights]
    )
