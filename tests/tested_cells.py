"""Cells for tests, which have what no other cell has, and their modules.

`tests/native/test_cells.h` defines the same cells for the CPU kernels. Only builds for development
compile them (`make setup`, or any build with NAMERNN_FAST_TEST_CELLS=1), so this module adds them
to `cells.NUMBERED`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from namernn_fast.cells import NUMBERED, Cell
from namernn_fast.cells.cell import (
    Input,
    LayerWeights,
    Parameter,
    State,
    Step,
    usual_parameters,
)
from namernn_fast.nn.base.layer import CustomLayer
from namernn_fast.nn.base.step_module import CustomStepModule
from namernn_fast.nn.base.token_layer import TokenLayer
from namernn_fast.nn.weights import CLASSES


def four_states(
    weights: LayerWeights, *, nonlinearity: str, in_place: bool, means: bool = False
) -> Step:
    """Returns a step of the cell `FourStates` of test_cells.h, with or without its means."""
    hidden_size, head = len(weights["rate"]), weights["weight_hh"].shape[1]
    a, (shift_i, shift_g) = weights["rate"].sigmoid(), weights["shift"].unbind()
    blocks = weights["weight_hh"].split(head)  # one for each gate and head

    def mean(values: Tensor) -> Tensor | float:
        return values.sum(1, keepdim=True) / values.shape[1] if means else 0.0

    def step(x: Tensor, states: Tensor) -> Tensor:
        h, c, n, m = states.split(hidden_size, 1)
        more = [hidden_size, 1] if x.shape[1] > 2 * hidden_size else []
        sums, *beside = x.split([2 * hidden_size, *more], 1)
        drive, attention = beside or (0.0, 0.0)
        heads = h.split(head, 1) * 2
        z = sums + torch.cat([h @ block.t() for h, block in zip(heads, blocks, strict=True)], 1)
        z_i, z_g = (z - mean(z)).chunk(2, 1)
        i, g = torch.sigmoid(z_i + shift_i), torch.tanh(z_g + shift_g)
        c = i * c + (1 - i) * g * 0.5
        n = (n + i) * 0.5
        m = g * m + h * 0.5 + drive
        h = torch.tanh(c + mean(0.0625 - c) + (a * m + attention) * n)
        return torch.cat([h, c, n, m], 1)

    return step


def independent(weights: LayerWeights, *, nonlinearity: str, in_place: bool) -> Step:
    """Returns a step of the cell `Independent` of test_cells.h."""

    def step(x: Tensor, states: Tensor) -> Tensor:
        (x_f, x_z), c = x.chunk(2, 1), states.chunk(2, 1)[1]
        c = torch.sigmoid(x_f) * c + x_z
        return torch.cat([torch.tanh(c), c], 1)

    return step


def _filled(values: float, hidden_size: int, blocks: int | None = None) -> Tensor:
    shape = (hidden_size,) if blocks is None else (blocks, hidden_size)
    return torch.full(shape, values, dtype=torch.float64)


RATE = Parameter("rate", ("hidden",), init=_filled)
SHIFT = Parameter("shift", ("gates", "hidden"), init=functools.partial(_filled, blocks=2))


def _four_states(name: str, number: int, means: bool) -> Cell:
    return Cell(
        name,
        number,
        "Fused" + name.title().replace("_", ""),
        gates=2,
        kept=5,
        make_step=functools.partial(four_states, means=means),
        parameters=usual_parameters(RATE, SHIFT, heads=True),
        inputs=(Input("drive"), Input("attention", is_number=True)),
        states=(State("h", "projected"), State("c"), State("n"), State("m")),
        only_in_float=True,
    )


TESTED_CELLS = (
    _four_states("four_states", 4, means=False),
    _four_states("with_means", 5, means=True),
    Cell(
        "independent",
        6,
        "FusedIndependent",
        gates=2,
        kept=2,
        make_step=independent,
        parameters=usual_parameters(recurs=False),
        states=(State("h", "projected"), State("c")),
        only_in_float=True,
    ),
)
NUMBERED.extend(TESTED_CELLS)


def _modules_of(cell: Cell) -> dict[str, Any]:
    """Returns the layer, step module and token layer of a cell, by name."""
    own = {parameter.name: 0.5 for parameter in cell.own}
    own |= {f"train_{parameter.name}": True for parameter in cell.own}

    def options_of(hidden_size: int, options: dict[str, Any]) -> dict[str, Any]:
        # Two heads where possible.
        heads = {"heads": 2 - hidden_size % 2} if cell.can_have_heads else {}
        return heads | own | options

    class Layer(CustomLayer):
        _cell = cell

        def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any):
            sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
            super().__init__(**sizes, **options_of(hidden_size, options))

    class StepModule(CustomStepModule):
        _cell = cell

        def __init__(self, input_size: int, hidden_size: int, **options: Any):
            super().__init__(input_size, hidden_size, **options_of(hidden_size, options))

    class Tokens(TokenLayer):
        _cell, _layer_class = cell, Layer

    made = cell.layer, f"{cell.layer}Cell", cell.layer.replace("Fused", "Token")
    for name, module_class in zip(made, (Layer, StepModule, Tokens), strict=True):
        del CLASSES[module_class.__name__]  # has the public classes
        module_class.__name__ = module_class.__qualname__ = name
    return dict(zip(made, (Layer, StepModule, Tokens), strict=True))


MODULES = {name: module for cell in TESTED_CELLS for name, module in _modules_of(cell).items()}
