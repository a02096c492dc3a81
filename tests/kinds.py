"""Defines a `Kind` for each cell, so that tests can create and compare layers of any cell."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equation_cells import MORE, TWINS
from plain import plain
from tested_cells import MODULES, TESTED_CELLS

import namernn_fast
from namernn_fast import (
    EquationCell,
    EquationLayer,
    TokenEquationLayer,
    cells,
    ops,
    torch_operators,
)
from namernn_fast.machine import availability

TRAINED = {"rate": 0.7, "train_rate": True}
"""Options that tests pass to modules that accept them. They give every parameter a gradient, and
make states decay about as fast as in cells without these options."""


class Kind:
    """A cell with its fused modules and functions, and torch's counterparts.

    `layer`, `step_module` and `tokens` create fused modules. If torch has no counterpart,
    `nn_layer` and `nn_step_module` create modules that run plain loops.
    """

    def __init__(self, cell: cells.Cell):
        self.cell = cell
        self.name = cell.name
        token_layer = cell.layer.replace("Fused", "Token")
        self.classes = [
            MODULES[name] if name in MODULES else getattr(namernn_fast, name)
            for name in (cell.layer, f"{cell.layer}Cell", token_layer)
        ]
        layer, step_module, _ = self.classes
        accepted = inspect.signature(layer).parameters
        options = {name: value for name, value in TRAINED.items() if name in accepted}
        self.layer, self.step_module, self.tokens = (
            functools.partial(cls, **options) if options else cls for cls in self.classes
        )
        if cell.torch is None:
            self.nn_layer, self.nn_step_module = (
                plain(cls, **options) for cls in (layer, step_module)
            )
        else:
            self.nn_layer, self.nn_step_module = cell.torch.layer, cell.torch.step_module
        self.run = getattr(namernn_fast, cell.name, None)
        self.passed: Any = cell.name  # the argument `cell` of functions
        self.gates = cell.gates
        self.has_cell_state = len(cell.states) > 1
        self.bits = 0  # option bits of the operators for layers of this kind

    def states(self, make: Callable[..., torch.Tensor], *size: int, **options: Any) -> Any:
        """Creates states with `make(*size)`. Returns h, or (h, c) if the cell has two states."""
        made = tuple(make(*size, **options) for _ in self.cell.states)
        return made if self.has_cell_state else made[0]

    @property
    def without_kernel(self) -> str:
        """The path that `explain` reports for a layer on a device without a kernel."""
        return "torch" if torch_operators.has_operator(self.cell) else "reference"

    @property
    def autocasts_only_products(self) -> bool:
        """Whether CPU autocast of a padded call rounds only products and keeps float32 states."""
        torch_has = self.cell.torch
        return torch_has is not None and "padded" in torch_has.autocasts_only_products

    @property
    def has_nonlinearity(self) -> bool:
        """Whether layers of this kind accept the option `nonlinearity`."""
        return len(self.cell.nonlinearities) > 1

    def known(self, options: dict) -> dict:
        """Returns the entries of `options` that layers of this kind accept."""
        lacking = () if self.has_nonlinearity else ("nonlinearity",)
        return {name: value for name, value in options.items() if name not in lacking}

    def twins(self, *args, **options):
        """Returns a fused layer and torch's layer with equal weights."""
        theirs = self.nn_layer(*args, **options)
        ours = self.layer(*args, **options)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


class ProjectedLstm(Kind):
    """An LSTM that projects h to hidden_size // 2 features, if hidden_size is at least 2."""

    def __init__(self):
        super().__init__(cells.LSTM)
        self.layer, self.nn_layer = map(self._projecting, (self.layer, self.nn_layer))
        make_tokens, self.run = self.tokens, functools.partial(self.run, projections=True)
        self.tokens = lambda vocabulary, *sizes, **options: make_tokens(
            vocabulary, *sizes, proj_size=sizes[1] // 2, **options
        )
        self.bits = ops.PROJECTIONS

    @staticmethod
    def _projecting(layer: type) -> Callable[..., Any]:
        def make(input_size: int, hidden_size: int, *args: Any, **options: Any) -> Any:
            return layer(input_size, hidden_size, *args, proj_size=hidden_size // 2, **options)

        return make

    def states(self, make: Callable[..., torch.Tensor], *size: int, **options: Any) -> Any:
        h_size = [*size[:-1], *(last // 2 or last for last in size[-1:])]
        return make(*h_size, **options), make(*size, **options)


class Equation(Kind):
    """A cell that is written as an equation. `twin` is the kind with the same equation, if any."""

    def __init__(self, defined: Any, twin: Kind | None):
        self.cell, self.name = defined._cell, defined.__name__
        self.classes = [EquationLayer, EquationCell, TokenEquationLayer]
        made = defined.layer, defined.step_module, defined.token_layer
        self.layer, self.step_module, tokens = map(self._with_heads, made)
        self.tokens = functools.partial(tokens, place=2)
        self.nn_layer, self.nn_step_module = (
            self._with_heads(plain(cls, cell=defined)) for cls in self.classes[:2]
        )
        if twin:
            self.nn_layer, self.nn_step_module = twin.nn_layer, twin.nn_step_module
        self.gates, self.bits, self.run = self.cell.gates, 0, defined.apply
        self.passed = defined
        self.has_cell_state = len(self.cell.states) > 1

    def _with_heads(self, make_module: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `make_module`, with two heads where possible if the cell can have heads."""

        def make(*sizes: int, place: int = 1, **options: Any) -> Any:
            """Makes a module. `place` is the place of hidden_size among the sizes."""
            heads = {"heads": 2 - sizes[place] % 2} if self.cell.can_have_heads else {}
            return make_module(*sizes, **(heads | options))

        return make


KINDS = {name: Kind(cell) for name, cell in cells.CELLS.items()}
DROP_INS = {name: kind for name, kind in KINDS.items() if kind.cell.torch is not None}
"""The kinds with modules that replace torch's modules."""
VARIANTS = {**KINDS, "projected": ProjectedLstm()}
"""The kinds, and an LSTM with projections, which runs separate code in the kernels."""
TESTED = {cell.name: Kind(cell) for cell in TESTED_CELLS}
"""The kinds of the cells that only tests have."""
EQUATION_KINDS = {name: Equation(cell, KINDS.get(twin)) for name, (cell, twin) in TWINS.items()}
"""The kinds of cells that are written as equations."""
TRIED_EQUATIONS = "gru_equation", "leaky_equation"
"""In `make test-all`, the tests of all kinds of layers also run these kinds of equations."""
SLOW_KINDS = EQUATION_KINDS.keys() - {"gru_equation"}
"""The kinds that only `make test-all` tests, except in tests of equations."""
EVERY = {**VARIANTS, **TESTED, **EQUATION_KINDS}
EVERY |= {name: Equation(cell, None) for name, cell in MORE.items()}
for_variants = pytest.mark.kinds(*VARIANTS)
"""Parametrizes a test that takes `kind` with every variant, instead of every kind."""
needs_extension = pytest.mark.skipif(
    not availability.HAS_EXTENSION, reason="the C++ extension was not built"
)


@functools.cache
def onednn_has_bfloat16_lstm() -> bool:
    """Returns whether torch's LSTM computes in bfloat16 under autocast, for dense input.

    On processors without AVX-512, torch raises an error or computes in float32.
    """
    with torch.autocast("cpu", torch.bfloat16):
        try:
            output, _ = torch.nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        except RuntimeError:
            return False
    return output.dtype == torch.bfloat16


def tensors_in(states: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors in a layer's states, which are None, a tensor or the pair (h, c)."""
    if states is None:
        return ()
    return states if isinstance(states, tuple) else (states,)


def flat(results: tuple) -> tuple[Any, ...]:
    """Flattens a layer's results into (output, h_n), or (output, h_n, c_n) for two states."""
    output, states = results
    return output, *tensors_in(states)


def map_states(states: Any, convert: Callable[..., torch.Tensor], *more: Any) -> Any:
    """Applies `convert` to each state. Like `map`, passes it the matching states from `more`."""
    if isinstance(states, tuple):
        return tuple(map(convert, states, *more))
    return convert(states, *more)


def states_of(kind: Kind, hx: Any) -> Any:
    """Returns `hx` as a layer takes it, which is (hx, hx) if the layer has a cell state."""
    return (hx, hx) if kind.has_cell_state and hx is not None else hx


def said_of(kind: Kind, text: str) -> str:
    """Converts a pattern for nn.RNN's error about hx to a pattern for this kind's torch layer."""
    if kind.has_cell_state:
        both = "hx and cx" if kind.cell.torch else "the states in hx"
        text = text.replace("hx should", f"{both} should").replace("got 2-D", r"got \(2-D, 2-D\)")
        text = text.replace("hidden size", r"hidden\[0\] size").replace("Tensor or None", "Tensor")
    return text


def kind_of(module: torch.nn.Module) -> Kind:
    """Returns the kind of a fused layer or of torch's layer."""
    return EVERY["projected" if module.proj_size else cells.cell_of(module).name]
