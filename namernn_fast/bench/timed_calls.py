"""Builds the calls to time: forward passes, or training steps with fixed random gradients.

Before a call is timed, its results are checked against the error budget. Every training step
passes gradients for `output` and for all last states. With a gradient for `h_n` alone, the gradient
of the state would decay to subnormal numbers within a hundred steps. Some processors handle
subnormals many times more slowly, and the benchmark would measure this slowdown instead of the
layers. `benchmarks/cpu/fading.py` in the repository measures the slowdown separately.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cells import CELLS, cell_of
from ..nn import RecurrentCell
from ..nn.states import states_in
from ..nn.weights import CLASSES as FUSED_CLASSES
from ..ops import state_sizes
from ..testing import NEARBY, assert_within_budget, nudged
from .race import TimedCall
from .workloads import FORWARD, GATES, LAYERS_OF, TRAINING, Layers, Workload

# The float64 oracle computes at most ORACLE_WORK multiply-adds, but at least ORACLE_ROWS rows.
ORACLE_WORK = 2**28
ORACLE_ROWS = 16

CLASSES: dict[str, tuple[Callable[..., nn.RNNBase], Callable[..., nn.RNNBase]]] = {
    name: (cell.torch.layer, FUSED_CLASSES[cell.layer])
    for name, cell in CELLS.items()
    if cell.torch is not None
}
"""The classes of torch's layer and the fused layer, in this order, by the name of their cell."""


def add_cell(text: str, cell: RecurrentCell) -> None:
    """Adds a user's cell to the cells to race, by the name `text`: a loop and its layer."""
    name = cell._cell.name
    LAYERS_OF[text] = Layers(f"loop over {name}", f"{name} layer")
    GATES[text], CLASSES[text] = cell._cell.gates, (cell.loop, cell.layer)


Input = Tensor | PackedSequence
Parameters = tuple[nn.Parameter, ...]
Gradients = tuple[Tensor, ...]
"""The gradients of `output` (of its data if it is packed) and of each last state."""
TrainingStep = Callable[[nn.Module, Parameters, Input, Gradients], tuple[Any, ...]]


def draw_gradients(layer: nn.RNNBase, input: Input) -> Gradients:
    """Returns fixed random gradients for every result of a layer. Call this before timing.

    Args:
        layer: A time-major layer.
        input: The layer's input, `(seq_len, batch, input_size)` or packed, with the layer's device
            and dtype.
    """
    if isinstance(input, PackedSequence):
        data, batch = input.data, int(input.batch_sizes[0])
    else:
        data, batch = input, input.shape[1]
    directions = 2 if layer.bidirectional else 1
    sizes = state_sizes(cell_of(layer), [*layer.parameters()])
    shapes = (
        (*data.shape[:-1], directions * sizes[0]),
        *((directions * layer.num_layers, batch, size) for size in sizes),
    )
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(shape, generator=generator).to(data) for shape in shapes)


def tensors_in(returned: Any) -> tuple[Tensor, ...]:
    """Returns the results of a module as one tuple: (output, h_n) or (output, h_n, c_n).

    A packed output is replaced by its data.
    """
    output, *states = returned
    data = output.data if isinstance(output, PackedSequence) else output
    return data, *(state for last_states in states for state in states_in(last_states))


def train(
    module: nn.Module, parameters: Parameters, input: Input, gradients: Gradients
) -> tuple[Any, ...]:
    """Runs the forward and the backward pass of a module.

    As in a first layer, gradients are computed for the parameters but not for the input.

    Args:
        module: A layer, or any module that returns an output and one or more states.
        parameters: The parameters of `module`; their previous gradients are discarded.
        input: The input of `module`.
        gradients: The gradients of the output and the states, from `draw_gradients`.
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
) -> TimedCall:
    """Returns the call to time: `module(input)`, or a training step with `gradients`."""
    if mode == FORWARD:
        return partial(module, input)
    return partial(step, module, tuple(module.parameters()), input, gradients)


def results(
    layer: nn.RNNBase, call: TimedCall, mode: str, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Runs a call; returns its output and last states, and in training the parameter gradients.

    Args:
        layer: The layer whose parameters the call trains.
        call: The call, from `call_of`.
        mode: `FORWARD` or `TRAINING`.
        rows: The indices of the sequences to return from a dense batch; default: all.
    """
    named: dict[str, Any] = dict(zip(("output", "h_n", "c_n"), tensors_in(call()), strict=False))
    if rows is not None:
        named = {name: value[:, rows] for name, value in named.items()}
    if mode == TRAINING:
        named |= {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    return {name: value.detach().cpu() for name, value in named.items()}


def rows_of_oracle(workload: Workload) -> Tensor | None:
    """Returns the indices of the sequences in a dense batch to check; None to check all."""
    count = min(workload.batch, max(ORACLE_ROWS, ORACLE_WORK // workload.row_work))
    return torch.linspace(0, workload.batch - 1, count).long() if count < workload.batch else None


def equal_layers(workload: Workload) -> dict[str, nn.RNNBase]:
    """Returns torch's layer and the fused layer of a workload, by name, with equal parameters."""
    torch.manual_seed(0)
    sizes = workload.input_size, workload.hidden_size
    baseline, fused = (make(*sizes, **workload.options) for make in CLASSES[workload.cell])
    fused.load_state_dict(baseline.state_dict())
    return dict(zip(workload.layers, (baseline, fused), strict=True))


def gated_calls(
    workload: Workload, input: Input, rows: Tensor | None = None, step: TrainingStep = train
) -> dict[str, TimedCall]:
    """Checks the results against the error budget; returns the calls to both layers, by layer name.

    Args:
        workload: The cell, the sizes and the mode. Both layers get equal parameters.
        input: The input of both layers.
        rows: The sequences of a dense batch that the float64 oracle computes; default: all. In
            training, the check sets the gradients of the other sequences to zero, so that only the
            oracle's sequences contribute to the parameter gradients.
        step: The training step.
    """
    layers = equal_layers(workload)
    baseline = layers[workload.layers.baseline]
    gradients = draw_gradients(baseline, input) if workload.mode == TRAINING else ()
    oracle_input: Any = input
    checked_gradients, oracle_gradients = gradients, gradients
    if rows is not None:
        oracle_input = oracle_input[:, rows]
        oracle_gradients = tuple(value[:, rows] for value in gradients)
        checked_gradients = tuple(torch.zeros_like(value) for value in gradients)
        for value, exact in zip(checked_gradients, oracle_gradients, strict=True):
            value[:, rows] = exact

    with torch.inference_mode(workload.mode == FORWARD):
        precise = copy.deepcopy(baseline).double()
        exact_gradients = tuple(value.double() for value in oracle_gradients)
        exact_input = oracle_input.to(torch.float64)
        call = call_of(precise, exact_input, workload.mode, exact_gradients, step)
        oracle = results(precise, call, workload.mode)
        generator, nearby = torch.Generator().manual_seed(3), []
        for _ in range(0 if workload.cell in CELLS else NEARBY):  # a user's may amplify rounding
            other, (x,) = nudged(precise, [exact_input], torch.float32, generator)
            call = call_of(other, x, workload.mode, exact_gradients, step)
            nearby.append(results(other, call, workload.mode))
        found = {
            name: results(
                layer,
                call_of(layer, input, workload.mode, checked_gradients, step),
                workload.mode,
                rows,
            )
            for name, layer in layers.items()
        }
    theirs, ours = (found[name] for name in workload.layers)
    assert_within_budget(ours, theirs, oracle, nearby=nearby)
    return {
        name: call_of(layer, input, workload.mode, gradients, step)
        for name, layer in layers.items()
    }
