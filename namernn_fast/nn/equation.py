"""`recurrent_cell` makes a cell of an equation; the other classes are the modules of such cells."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..cells import Cell
from ..equations import Program, cell_of_program, initial_values
from ..functional import run
from .base.layer import CustomLayer
from .base.step_module import CustomStepModule
from .base.token_layer import TokenLayer
from .weights import arguments_of

Initial = float | Sequence[float] | Tensor | None
"""The initial values of a parameter: a number, or a value for each unit; None to draw them."""


class EquationLayer(CustomLayer[Any]):
    """A layer whose cell is an equation; `RecurrentCell.layer` makes it.

    Calls, parameters and their initialisation are as in `FusedGRU`. `hx` and the returned states
    are a tensor if the cell has one state, otherwise a tuple of one tensor per state. The keyword
    arguments of a call are the cell's inputs. On a CPU, runs in one operator.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as in `FusedGRU`.
        bidirectional, device, dtype, batch_invariant: as in `FusedGRU`.
        cell: the cell.
        own: for each parameter of the cell its initial values, by name, and whether it requires
            gradients, as `train_<name>`; for a cell with heads their number, `heads`.

    Example:
        >>> @recurrent_cell(gates=1, states=2, weight_hh=False, parameters={"decay": 2.0})
        ... def average(x, h, c, decay):
        ...     c = c + (x[0] - c) * torch.sigmoid(-decay)
        ...     return torch.tanh(c), c
        >>> layer = average.layer(8, 16, decay=1.0)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape, layer.decay_l0[0]
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]), tensor(1., grad_fn=<SelectBackward0>))
    """

    _cell: Cell = None  # type: ignore[assignment]  # each layer has its own

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Cell,
        batch_invariant: bool = False,
        **own: Any,
    ) -> None:
        arguments = arguments_of(locals())
        del arguments["cell"], arguments["own"]
        self.__dict__["_cell"] = cell
        super().__init__(**arguments, **_own_options(cell, own))

    def extra_repr(self) -> str:
        """Returns the name of the cell and the options, for `repr`."""
        return f"{self._cell.name}, {super().extra_repr()}"


class EquationCell(CustomStepModule[Any]):
    """One step of an `EquationLayer`; `RecurrentCell.step_module` makes it.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `FusedGRUCell`.
        cell, own: as in `EquationLayer`.

    Example:
        >>> @recurrent_cell(gates=1, states=2, weight_hh=False)
        ... def average(x, h, c):
        ...     c = 0.9 * c + 0.1 * x[0]
        ...     return torch.tanh(c), c
        >>> cell = average.step_module(8, 16)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h.shape, c.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    _cell: Cell = None  # type: ignore[assignment]  # each module has its own

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        cell: Cell,
        **own: Any,
    ) -> None:
        self.__dict__.update(_cell=cell, _names=self._names_for(cell))
        super().__init__(
            input_size, hidden_size, bias, device=device, dtype=dtype, **_own_options(cell, own)
        )

    def extra_repr(self) -> str:
        """Returns the name of the cell and the options, for `repr`."""
        return f"{self._cell.name}, {super().extra_repr()}"


class TokenEquationLayer(TokenLayer[Any]):
    """An `nn.Embedding` followed by an `EquationLayer`; `RecurrentCell.token_layer` makes it.

    Works like `TokenGRU`.

    Args:
        num_embeddings, input_size, padding_idx: as in `TokenGRU`.
        sizes, options: hidden_size and all options, as in `EquationLayer`.
        cell: as in `EquationLayer`.

    Example:
        >>> @recurrent_cell(gates=1)
        ... def rectified(x, u, h):
        ...     return torch.relu(x[0] + u[0])
        >>> model = rectified.token_layer(31, 8, 16, padding_idx=0)
        >>> model.last_state(torch.randint(1, 31, (5, 3))).shape
        torch.Size([1, 3, 16])
    """

    rnn: EquationLayer
    _cell: Cell = None  # type: ignore[assignment]  # each model has its own
    _layer_class = EquationLayer

    def __init__(
        self, num_embeddings: int, input_size: int, *sizes: Any, cell: Cell, **options: Any
    ) -> None:
        self.__dict__["_cell"] = cell
        super().__init__(num_embeddings, input_size, *sizes, cell=cell, **options)


def _own_options(cell: Cell, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor that only this cell has, with defaults added.

    Raises:
        TypeError: an argument that is given is not one of them.
    """
    options: dict[str, Any] = {parameter.name: None for parameter in cell.own}
    options |= {f"train_{parameter.name}": True for parameter in cell.own}
    options |= {"heads": 1} if cell.can_have_heads else {}
    if unknown := given.keys() - options.keys():
        raise TypeError(f"a {cell.name} module takes no argument {min(unknown)!r}")
    return options | {**given}


class RecurrentCell:
    """A cell that a function of one step defines; `recurrent_cell` makes it.

    Calling it calls the function. A pickle refers to it by its name, as to a function; modules with
    this cell do not need it, because they contain its program.

    Attributes:
        program: what kernels run, a readable text.
    """

    def __init__(
        self, step: Callable[..., Any], program: Program, initial: Mapping[str, Initial]
    ) -> None:
        self.program = program.text
        self._step = step
        described = cell_of_program(self.program)
        parameters = tuple(
            replace(p, init=_init_of(initial[p.name])) if p.role == "own" else p
            for p in described.parameters
        )
        self._cell = replace(described, parameters=parameters)
        functools.update_wrapper(self, step)

    def __reduce__(self) -> str:
        return self.__qualname__  # type: ignore[attr-defined,no-any-return]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Computes one step with the function itself."""
        return self._step(*arguments, **keywords)

    def __repr__(self) -> str:
        return f"<recurrent cell {self._cell.name}>"

    def layer(self, *sizes: Any, **options: Any) -> EquationLayer:
        """Returns a layer with this cell. Takes the arguments of `EquationLayer` except cell."""
        return EquationLayer(*sizes, cell=self._cell, **options)

    def step_module(self, *sizes: Any, **options: Any) -> EquationCell:
        """Returns a module for one step. Takes the arguments of `EquationCell` except cell."""
        return EquationCell(*sizes, cell=self._cell, **options)

    def token_layer(self, *sizes: Any, **options: Any) -> TokenEquationLayer:
        """Returns a token layer. Takes the arguments of `TokenEquationLayer` except cell."""
        return TokenEquationLayer(*sizes, cell=self._cell, **options)

    def apply(
        self,
        input: Input,
        hx: Any,
        weights: Sequence[Tensor],
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        training: bool = False,
        batch_invariant: bool = False,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        embedding: Tensor | None = None,
        padding_idx: int | None = None,
        **inputs: Input | None,
    ) -> tuple[Input, Any]:
        """Applies this cell to sequences, in one or more layers, as `gru()` does.

        Args:
            input, bias, .., padding_idx: as in `gru()`.
            hx: the initial states, each shaped like hx of `gru()`: a tensor if the cell has one
                state, otherwise a tuple; None for zeros.
            weights: the parameters of each direction of each layer, in the order of
                `EquationLayer.state_dict`.
            inputs: the cell's inputs, by name, as in a call of the layer.

        Returns:
            output, and the last states, structured like hx.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as in `gru()`.
        """
        options = option_bits(
            self._cell,
            weights,
            nonlinearity="tanh",
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            batch_invariant=batch_invariant,
        )
        arguments = Arguments(input, hx, lengths, reset, reset_to, embedding, padding_idx, inputs)
        call = normalise(arguments, self._cell, weights, options, dropout * training)
        return run(arguments, call)


def _init_of(values: Initial) -> Callable[[Any, int], Tensor] | None:
    """Returns `Parameter.init` of a parameter with these initial values."""
    return None if values is None else functools.partial(initial_values, default=values)


def recurrent_cell(
    *,
    gates: int,
    states: int = 1,
    weight_hh: bool = True,
    heads: bool = False,
    parameters: Mapping[str, Initial] = {},
    gate_parameters: Mapping[str, Initial] = {},
    inputs: Sequence[str] = (),
    number_inputs: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], RecurrentCell]:
    """Makes a recurrent cell of a Python function that computes one step.

    The function is traced once, when it is defined. It takes `step(x, u, h, ..)`: x and u are
    tuples of one tensor per gate, W_ih x_t + b_ih and W_hh h_{t-1} + b_hh, each (rows,
    hidden_size); h and further states are (rows, hidden_size). It returns the new states, h first.
    Parameters and inputs are passed by name. The function may use element-wise ATen operators, and
    means over units.

    Args:
        gates: the number of blocks of hidden_size rows in weight_ih and weight_hh.
        states: the number of states, 1 to 4.
        weight_hh: whether the cell multiplies h by weight_hh. If not, the function gets no u.
        heads: whether layers may split h into heads, so that weight_hh is block-diagonal.
        parameters: the cell's own parameters (hidden_size), by name, with their initial values.
        gate_parameters: parameters (gates, hidden_size). The function gets a tuple of one tensor
            (hidden_size) per gate.
        inputs: names of inputs besides x, (rows, hidden_size).
        number_inputs: names of inputs with one number in each row, (rows, 1).

    Raises:
        TypeError, ValueError: the function does what kernels cannot compute, and the message names
            the operation and its line; or a name is taken.

    Example:
        >>> @recurrent_cell(gates=2)
        ... def minimal_gated(x, u, h):
        ...     f = torch.sigmoid(x[0] + u[0])
        ...     n = torch.tanh(x[1] + f * u[1])
        ...     return n + f * (h - n)
        >>> layer = minimal_gated.layer(8, 16)
        >>> output, h_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """
    used_by = EquationLayer, EquationLayer.forward
    taken = {name for callee in used_by for name in inspect.signature(callee).parameters}
    taken |= {"bias_ih", "bias_hh", "heads"}
    for name in (*parameters, *gate_parameters, *inputs, *number_inputs):
        if not name.isidentifier() or name in taken or name.startswith(("weight_", "train_")):
            raise ValueError(f"a parameter or an input must not be called {name!r}")
    own = dict.fromkeys(parameters, 1) | dict.fromkeys(gate_parameters, gates)
    beside = dict.fromkeys(inputs, False) | dict.fromkeys(number_inputs, True)

    def define(step: Callable[..., Any]) -> RecurrentCell:
        # Imported here, because most programs define no cells.
        from ..equations.compiling import compile_step

        program = compile_step(
            step,
            name=step.__name__,
            gates=gates,
            states=states,
            recurs=weight_hh,
            heads=heads,
            own=own,
            inputs=beside,
        )
        return RecurrentCell(step, program, {**parameters, **gate_parameters})

    return define


__all__ = ["EquationCell", "EquationLayer", "RecurrentCell", "TokenEquationLayer", "recurrent_cell"]
