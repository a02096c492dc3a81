"""Each layer as one `RNN` node of ONNX, for `torch.onnx.export(model, ..., dynamo=True)`.

While that traces a model, `rnn()` writes torch.onnx's own operator for an ONNX node in place of
ours, so that the exporter needs no translation from its caller. Needs no package but torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops


def exporting() -> bool:
    """Whether torch.onnx.export is at work. To be asked while tracing only: it is slow."""
    return torch.onnx.is_in_onnx_export()


# Dynamo would take the answer for False, and the exporter, which turns to Dynamo after an error,
# would then end at our operator instead of showing that error. This is what the decorator
# torch.compiler.assume_constant_result does, but for importing Dynamo.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rnn_forward(*arguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator of that name, without `hidden`.

    As a decomposition it prepares a program that torch.export made before:
    `torch.onnx.export(program.run_decompositions({ops.rnn_forward: onnx.rnn_forward}))`.
    """
    return *rnn_stack(*arguments), []


def rnn_stack(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    rows: Tensor | None,
    reset: Tensor | None,
    options: int,
) -> tuple[Tensor, Tensor]:
    """A stack of layers over whole sequences; arguments and results as in `namernn_fast.ops`.

    Args:
        rows: lengths (batch), integers from 0 to seq_len in any order: the steps of each sequence
            of padded input, which is all that ONNX has. output is zero past them, and h_n the state
            after the last of them, which is hx where there is none. None: all sequences have
            seq_len steps.
        reset: None; ONNX has no such thing.
        options: BATCH_INVARIANT is not for us to promise of what runs the graph.

    Raises:
        ValueError: input is packed or jagged, or reset is given.
    """
    if options & (ops.PACKED | ops.JAGGED):
        kind = "PackedSequence" if options & ops.PACKED else "jagged tensor"
        raise ValueError(f"ONNX has no {kind}: export a model that takes padded input and lengths=")
    if reset is not None:
        raise ValueError(
            "ONNX has no reset: export a model that takes the pieces between resets as sequences "
            "of their own, padded, with lengths="
        )
    if options & ops.BATCH_FIRST:
        input = input.transpose(0, 1)
    states = []
    for own_hx, own_weights in ops.layers_of(hx, weights, options):
        input, h_n = _layer(input, own_hx, own_weights, rows, options)
        states.append(h_n)
    output = input.transpose(0, 1) if options & ops.BATCH_FIRST else input
    return output, states[0] if len(states) == 1 else torch.cat(states)


def _layer(input, hx, weights, lengths, options):
    directions = ops.directions_of(options)
    per_direction = len(weights) // directions
    weight_ih, weight_hh, *biases = (
        torch.stack(weights[k::per_direction]) for k in range(per_direction)
    )
    seq_len, batch, _ = input.shape
    hidden_size = weight_hh.shape[1]
    output, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (
            input,
            weight_ih,
            weight_hh,
            torch.cat(biases, 1) if biases else None,
            None if lengths is None else lengths.clamp(min=1).to(torch.int32),
            hx,
        ),
        {
            "activations": ["Relu" if options & ops.RELU else "Tanh"] * directions,
            "direction": "forward" if directions == 1 else "bidirectional",
            "hidden_size": hidden_size,
        },
        dtypes=(input.dtype, input.dtype),
        shapes=((seq_len, directions, batch, hidden_size), (directions, batch, hidden_size)),
    )
    # The stand-in's results are on the CPU, whatever its inputs are.
    output, h_n = output.to(input.device), h_n.to(input.device)
    output = output.squeeze(1) if directions == 1 else output.transpose(1, 2).flatten(2)
    if lengths is not None:  # ONNX says nothing of Y past the end, nor of sequences without a step
        steps = torch.arange(seq_len, device=input.device)[:, None, None]
        output = output.where(steps < lengths[:, None], 0)
        h_n = h_n.where(lengths[:, None] > 0, 0 if hx is None else hx)
    return output, h_n
