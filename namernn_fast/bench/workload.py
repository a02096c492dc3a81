"""The timed work of a cell: a forward pass, or a training step with fixed random gradients.

The gate of a cell checks the results of the very calls that are timed. Every training step gives
gradients to `output` and to all last states. With a gradient at `h_n` alone, the gradient of the
state decays within a hundred steps to subnormal numbers, which some processors handle many times
slower: a benchmark would measure that weakness instead of the work. `benchmarks/cpu/fading.py` in
the repository measures that case separately.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cells import cell_of
from ..nn import LAYERS as FUSED_LAYERS
from ..step_modules import states_in
from ..testing import assert_within_budget
from .cells import FORWARD, TRAINING, Cell
from .race import Call

# Maximum multiply-adds of the oracle, unless that is less than the minimum number of sequences.
ORACLE_WORK = 2**28
ORACLE_ROWS = 16

CLASSES: dict[str, tuple[Callable[..., nn.RNNBase], Callable[..., nn.RNNBase]]] = {
    name: (layer._cell.torch_layer, layer) for name, layer in FUSED_LAYERS.items()
}
"""The classes of both layers by the name of their cell, in the order of `Cell.layers`."""

Input = Tensor | PackedSequence
Parameters = tuple[nn.Parameter, ...]
Gradients = tuple[Tensor, ...]
"""The gradient of `output`, or of its data if it is packed, and the gradient of each state."""
TrainingStep = Callable[[nn.Module, Parameters, Input, Gradients], tuple[Any, ...]]


def draw_gradients(layer: nn.RNNBase, input: Input) -> Gradients:
    """Returns fixed random gradients of all results of a layer; call it outside of what is timed.

    Args:
        layer: A time-major layer.
        input: Its input, `(seq_len, batch, input_size)` or packed, on the layer's device and in the
            layer's dtype.
    """
    if isinstance(input, PackedSequence):
        data, batch = input.data, int(input.batch_sizes[0])
    else:
        data, batch = input, input.shape[1]
    directions = 2 if layer.bidirectional else 1
    states = len(cell_of(layer).states)
    shapes = (
        (*data.shape[:-1], directions * layer.hidden_size),
        *[(directions * layer.num_layers, batch, layer.hidden_size)] * states,
    )
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(shape, generator=generator).to(data) for shape in shapes)


def tensors_in(returned: Any) -> tuple[Tensor, ...]:
    """Returns the results of a module in one tuple: output, h_n and, for an LSTM, c_n.

    Of a packed output it returns the data.
    """
    output, *states = returned
    data = output.data if isinstance(output, PackedSequence) else output
    return data, *(state for given in states for state in states_in(given))


def train(
    module: nn.Module, parameters: Parameters, input: Input, gradients: Gradients
) -> tuple[Any, ...]:
    """Runs a module forward, and backward from `gradients` of its output and states.

    The parameters receive gradients, but not the input, as in a first layer.

    Args:
        module: A layer, or any module that returns an output and one or more states.
        parameters: The parameters of `module`; their previous gradients are dropped.
        input: The input of `module`.
        gradients: The gradients of the results of `module`, from `draw_gradients`.
    """
    for parameter in parameters:
        parameter.grad = None
    returned: tuple[Any, ...] = module(input)
    torch.autograd.backward(tensors_in(returned), gradients)
    return returned


def call_of(
    module: nn.Module,
    input: Input,
    mode: str,
    gradients: Gradients = (),
    step: TrainingStep = train,
) -> Call:
    """Returns the call to be timed: `module(input)`, or a training step with `gradients`."""
    if mode == FORWARD:
        return partial(module, input)
    return partial(step, module, tuple(module.parameters()), input, gradients)


def results(
    layer: nn.RNNBase, call: Call, mode: str, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Makes a call and returns its output, its last states and, in training, all gradients.

    Args:
        layer: The layer whose parameters the call trains.
        call: The call, from `call_of`.
        mode: The mode of the call.
        rows: The sequences of a dense batch whose output and last states to return; default: all.
    """
    named: dict[str, Any] = dict(zip(("output", "h_n", "c_n"), tensors_in(call()), strict=False))
    if rows is not None:
        named = {name: value[:, rows] for name, value in named.items()}
    if mode == TRAINING:
        named |= {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    return {name: value.detach().cpu() for name, value in named.items()}


def rows_of_oracle(cell: Cell) -> Tensor | None:
    """Returns the sequences of a dense batch that the gate checks, or None for all of them."""
    known = min(cell.batch, max(ORACLE_ROWS, ORACLE_WORK // cell.row_work))
    return torch.linspace(0, cell.batch - 1, known).long() if known < cell.batch else None


def equal_layers(cell: Cell) -> dict[str, nn.RNNBase]:
    """Returns both layers of a cell by name, with equal parameters."""
    torch.manual_seed(0)
    baseline, fused = (make(cell.input_size, cell.hidden_size) for make in CLASSES[cell.kind])
    fused.load_state_dict(baseline.state_dict())
    return dict(zip(cell.layers, (baseline, fused), strict=True))


def gated_calls(
    cell: Cell, input: Input, rows: Tensor | None = None, step: TrainingStep = train
) -> dict[str, Call]:
    """Returns the calls of both layers, with equal parameters, after the gate has passed.

    Args:
        cell: The sizes of the layers, and the mode.
        input: The input of both.
        rows: The sequences of a dense batch that the float64 oracle computes; default: all. In
            training the gate then gives zero gradients to the other sequences, so that the oracle's
            parameter gradients are complete although the layers run the whole batch.
        step: The training step.
    """
    layers = equal_layers(cell)
    baseline = layers[cell.layers.baseline]
    gradients = draw_gradients(baseline, input) if cell.mode == TRAINING else ()
    known: Any = input
    seen, seen_by_oracle = gradients, gradients
    if rows is not None:
        known, seen_by_oracle = known[:, rows], tuple(value[:, rows] for value in gradients)
        seen = tuple(torch.zeros_like(value) for value in gradients)
        for value, exact in zip(seen, seen_by_oracle, strict=True):
            value[:, rows] = exact

    with torch.inference_mode(cell.mode == FORWARD):
        precise = copy.deepcopy(baseline).double()
        exact_gradients = tuple(value.double() for value in seen_by_oracle)
        call = call_of(precise, known.to(torch.float64), cell.mode, exact_gradients, step)
        oracle = results(precise, call, cell.mode)
        found = {
            name: results(layer, call_of(layer, input, cell.mode, seen, step), cell.mode, rows)
            for name, layer in layers.items()
        }
    theirs, ours = (found[name] for name in cell.layers)
    assert_within_budget(ours, theirs, oracle)
    return {
        name: call_of(layer, input, cell.mode, gradients, step) for name, layer in layers.items()
    }
