"""Each layer as one `RNN` node of ONNX, for `torch.onnx.export(model, ..., dynamo=True)`.

While that traces a model, `rnn()` writes torch.onnx's own operator for an ONNX node in place of
ours, so that the exporter needs no translation from its caller. Needs no package but torch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import layers_of


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
    return *rnn_stack(*arguments[:-1]), []


def rnn_stack(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    num_layers: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    reset: Tensor | None,
    nonlinearity: str,
    bidirectional: bool,
    batch_first: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """A stack of layers over whole sequences; arguments and results as in `namernn_fast.ops`.

    Args:
        batch_sizes, offsets: None; ONNX has padded input only.
        lengths: (batch), integers from 0 to seq_len in any order: the steps of each sequence of
            padded input. output is zero past them, and h_n the state after the last of them, which
            is hx where there is none. None: all sequences have seq_len steps.
        reset: None; ONNX has no such thing.
        batch_invariant: not for us to promise of what runs the graph.

    Raises:
        ValueError: batch_sizes, offsets or reset is given.
    """
    if batch_sizes is not None or offsets is not None:
        raise ValueError(
            f"ONNX has no {'PackedSequence' if offsets is None else 'jagged tensor'}: export a "
            "model that takes padded input and lengths="
        )
    if reset is not None:
        raise ValueError(
            "ONNX has no reset: export a model that takes the pieces between resets as sequences "
            "of their own, padded, with lengths="
        )
    directions = 2 if bidirectional else 1
    if batch_first:
        input = input.transpose(0, 1)
    states = []
    for own_hx, own_weights in layers_of(hx, weights, num_layers):
        input, h_n = _layer(input, own_hx, own_weights, lengths, nonlinearity, directions)
        states.append(h_n)
    output = input.transpose(0, 1) if batch_first else input
    return output, states[0] if num_layers == 1 else torch.cat(states)


def _layer(input, hx, weights, lengths, nonlinearity, directions):
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
            "activations": [nonlinearity.capitalize()] * directions,
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
