"""What is timed in a layer's cell, and a look at the same: the gate runs what the clock runs."""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.harness import gate
from benchmarks.harness.grid import BASELINE, FORWARD, FUSED, Cell
from benchmarks.harness.race import Call
from namernn_fast import FusedRNN

Input = Tensor | PackedSequence
Parameters = tuple[nn.Parameter, ...]


def train(
    layer: nn.RNN, parameters: Parameters, input: Input, rows: Tensor | None = None
) -> tuple[Input, Tensor]:
    """Forward and backward from the last states, of all rows or of some.

    As for a first layer, the parameters have gradients and the input has none.
    """
    for parameter in parameters:
        parameter.grad = None
    output, h_n = layer(input)
    (h_n if rows is None else h_n[:, rows]).sum().backward()
    return output, h_n


def look(layer: nn.RNN, input: Input, mode: str, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Run a layer as it will be timed; its results for `rows` of the batch and their gradients.

    The gradients are those of a loss over these rows alone, so a slice of the batch is enough to
    know what they have to be, though the whole batch is run.
    """
    if mode == FORWARD:
        with torch.inference_mode():
            output, h_n = layer(input)
        gradients = {}
    else:
        output, h_n = train(layer, tuple(layer.parameters()), input, rows)
        gradients = {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    states = {"output": output.data if isinstance(output, PackedSequence) else output, "h_n": h_n}
    if rows is not None:
        states = {name: value[:, rows] for name, value in states.items()}
    return {name: value.detach() for name, value in states.items()} | gradients


def gated_calls(cell: Cell, input: Input, rows: Tensor | None = None) -> dict[str, Call]:
    """The two calls to time, over the same parameters, after both met the gate.

    `rows` names the sequences of a dense batch that the float64 oracle computes: all by default.
    """
    torch.manual_seed(0)
    baseline = nn.RNN(cell.input_size, cell.hidden_size)
    fused = FusedRNN(cell.input_size, cell.hidden_size)
    fused.load_state_dict(baseline.state_dict())

    known = input if rows is None else input[:, rows]
    oracle = look(copy.deepcopy(baseline).double(), known.to(torch.float64), cell.mode)
    gate.check(look(fused, input, cell.mode, rows), look(baseline, input, cell.mode, rows), oracle)

    layers = {BASELINE: baseline, FUSED: fused}
    if cell.mode == FORWARD:
        return {name: partial(layer, input) for name, layer in layers.items()}
    return {
        name: partial(train, layer, tuple(layer.parameters()), input)
        for name, layer in layers.items()
    }
