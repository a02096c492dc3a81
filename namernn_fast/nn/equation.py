"""`recurrent_cell` makes a cell of an equation, and `RecurrentCell` makes modules of this cell."""

import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..call import Arguments, Input, Lengths, normalise
from ..call.options import option_bits
from ..equations import Program, cell_of_program, initial_values
from ..functional import run
from .equation_loop import EquationLoop
from .equation_modules import EquationCell, EquationLayer, TokenEquationLayer

Initial = float | Sequence[float] | Tensor | None
"""The initial values of a parameter: a number, or a value for each unit; None to draw them."""


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
        name: str = self.__qualname__  # type: ignore[attr-defined]
        if "<locals>" in name:
            raise pickle.PicklingError(
                f"a recurrent cell is pickled by the name of its function, got {name!r}, which is "
                "inside a function: define it in a module. Its layers can be pickled anyway"
            )
        return name

    def __copy__(self) -> "RecurrentCell":  # a cell cannot change, like a function
        return self

    def __deepcopy__(self, memo: Any) -> "RecurrentCell":
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Computes one step with the function itself."""
        return self._step(*arguments, **keywords)

    def __repr__(self) -> str:
        return f"<recurrent cell {self._cell.name}>"

    def layer(self, *sizes: Any, **options: Any) -> EquationLayer:
        """Returns a layer with this cell. Takes the arguments of `EquationLayer` except cell."""
        return EquationLayer(*sizes, cell=self, **options)

    def step_module(self, *sizes: Any, **options: Any) -> EquationCell:
        """Returns a module for one step. Takes the arguments of `EquationCell` except cell."""
        return EquationCell(*sizes, cell=self, **options)

    def token_layer(self, *sizes: Any, **options: Any) -> TokenEquationLayer:
        """Returns a token layer. Takes the arguments of `TokenEquationLayer` except cell."""
        return TokenEquationLayer(*sizes, cell=self, **options)

    def loop(self, *sizes: Any, **options: Any) -> EquationLoop:
        """Returns a layer that calls the function for every step, to compare with.

        Takes the arguments of `layer`.
        """
        return EquationLoop(*sizes, cell=self, **options)

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
        ...     return (1 - f) * h + f * n
        >>> layer = minimal_gated.layer(8, 16)
        >>> output, h_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([1, 3, 16]))
    """
    _check_lists(gates, parameters, gate_parameters, inputs, number_inputs)
    own = dict.fromkeys(parameters, 1) | dict.fromkeys(gate_parameters, gates)
    beside = dict.fromkeys(inputs, False) | dict.fromkeys(number_inputs, True)

    def define(step: Callable[..., Any]) -> RecurrentCell:
        # Imported here, because most programs define no cells.
        from ..equations.compiling import compile_step

        _check_signature(step, weight_hh, states, [*own, *beside])
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


def _check_lists(
    gates: int,
    parameters: Mapping[str, Initial],
    gate_parameters: Mapping[str, Initial],
    inputs: Sequence[str],
    number_inputs: Sequence[str],
) -> None:
    """Raises an error if an argument of `recurrent_cell` has the wrong type or a taken name."""
    for argument, initial in (("parameters", parameters), ("gate_parameters", gate_parameters)):
        if not isinstance(initial, Mapping):
            what = "a mapping of names to initial values"
            raise TypeError(f"{argument} must be {what}, got {initial!r}")
    for argument, names in (("inputs", inputs), ("number_inputs", number_inputs)):
        if isinstance(names, str):
            raise TypeError(f"{argument} must be a sequence of names, got the string {names!r}")
    used_by = EquationLayer, EquationLayer.forward
    taken = {name for callee in used_by for name in inspect.signature(callee).parameters}
    taken |= {"bias_ih", "bias_hh", "cell", "heads"}
    for name in (*parameters, *gate_parameters, *inputs, *number_inputs):
        if not name.isidentifier() or name in taken or name.startswith(("weight_", "train_")):
            raise ValueError(f"a parameter or an input must not be called {name!r}")
    if gate_parameters and gates == 1:
        raise ValueError("gate_parameters need gates of at least 2: pass parameters instead")


def _check_signature(
    step: Callable[..., Any], recurs: bool, states: int, names: Sequence[str]
) -> None:
    """Raises TypeError unless a step takes x, u if the cell recurs, the states, and these names."""
    signature, by_position = inspect.signature(step), 1 + recurs + states
    try:
        signature.bind(*[None] * by_position, **dict.fromkeys(names))
    except TypeError as error:
        counted = f"{states} state{'s' if states > 1 else ''}"
        wanted = ", ".join(["x", *["u"] * recurs, counted, *names])
        raise TypeError(f"{step.__name__}{signature} must take ({wanted}): {error}") from None


__all__ = ["RecurrentCell", "recurrent_cell"]
