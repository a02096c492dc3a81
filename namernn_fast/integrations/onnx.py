"""ONNX: exports each layer as an `RNN` or `GRU` node for `torch.onnx.export(..., dynamo=True)`.

While that function traces a model, `rnn()` emits torch.onnx's symbolic operator for an ONNX node
instead of this package's operators, so that callers need no custom translation table. This module
needs no package except torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..call import Call


def exporting() -> bool:
    """Returns whether torch.onnx.export is running. Slow: call it only while tracing."""
    return torch.onnx.is_in_onnx_export()


# Dynamo would evaluate exporting() to False. The exporter falls back to Dynamo after an error, and
# would then fail at this package's operators and hide that error. This attribute is what the
# decorator torch.compiler.assume_constant_result sets, but without importing Dynamo.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rnn_stack(call: Call) -> tuple[Tensor, Tensor]:
    """Runs a stack of layers over whole sequences, each layer as an ONNX node.

    Output is zero past the end of a sequence, and h_n of a sequence of length 0 is its hx.

    Args:
        call: padded sequences of features, with or without lengths; during an export
            `tokens.look_up` has replaced token ids by their rows. BATCH_INVARIANT is ignored,
            because another runtime will run the graph.

    Returns:
        output and h_n.

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
    for own_hx, layer in zip(
        ops.states_of_layers(call.hx, weights, options),
        ops.layers_of(weights, options),
        strict=True,
    ):
        input, h_n = _layer(call, input, own_hx, layer)
        states.append(h_n)
    output = input.transpose(0, 1) if options & ops.BATCH_FIRST else input
    return output, states[0] if len(states) == 1 else torch.cat(states)


def _layer(
    call: Call, input: Tensor, hx: Tensor | None, layer: list[ops.LayerWeights]
) -> tuple[Tensor, Tensor]:
    """Emits the ONNX node of one layer of a call and returns its output and h_n."""
    lengths, options = call.sequence_layout, call.options
    directions = len(layer)
    weights_ih, weights_hh, biases_ih, biases_hh = zip(*layer, strict=True)
    attributes: dict[str, Any] = {
        "direction": "forward" if directions == 1 else "bidirectional",
        "hidden_size": ops.hidden_size_of(call.weights),
    }
    if call.cell == "gru":
        attributes["linear_before_reset"] = 1  # as torch: the reset gate scales W_hn h + b_hn
    else:
        attributes["activations"] = ["Relu" if options & ops.RELU else "Tanh"] * directions
    seq_len, batch, _ = input.shape
    hidden_size = ops.hidden_size_of(call.weights)
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        call.cell.upper(),
        (
            input,
            _stacked(weights_ih, call),
            _stacked(weights_hh, call),
            torch.cat([_stacked(biases_ih, call), _stacked(biases_hh, call)], 1)
            if options & ops.BIAS
            else None,
            None if lengths is None else lengths.clamp(min=1).to(torch.int32),
            hx,
        ),
        attributes,
        dtypes=(input.dtype, input.dtype),
        shapes=((seq_len, directions, batch, hidden_size), (directions, batch, hidden_size)),
    )
    # symbolic_multi_out returns CPU tensors, whatever the device of its inputs is.
    output, h_n = output.to(input.device), h_n.to(input.device)
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)
    if lengths is not None:  # ONNX leaves Y past the end, and sequences of length 0, undefined
        steps = torch.arange(seq_len, device=input.device)[:, None, None]
        output = output.where(steps < lengths[:, None], 0)
        h_n = h_n.where(lengths[:, None] > 0, 0 if hx is None else hx)
    return output, h_n


def _stacked(weights: Sequence[Tensor], call: Call) -> Tensor:
    """Stacks a kind of weight or bias of all directions, with the gates in the order of ONNX.

    That of a GRU is z, r, n in ONNX; torch has r, z, n.
    """
    if call.cell == "rnn":
        return torch.stack([*weights])
    size = ops.hidden_size_of(call.weights)
    # Slices instead of chunks: the exporter cannot evaluate Split in advance, and warns about each.
    return torch.stack([torch.cat([w[size : 2 * size], w[:size], w[2 * size :]]) for w in weights])
