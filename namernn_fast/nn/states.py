"""The states of a layer or step module, as users pass them: one tensor, or a pair of them."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from ..call import Arguments, given
from ..cells import Cell
from ..machine.context import is_compiling

States = TypeVar("States", bound=Tensor | tuple[Tensor, Tensor])
"""The type of a layer's states: a tensor, or a pair if the cell has two."""


_OF_SEQUENCES = {field.name for field in fields(Arguments)}


def states_in(hx: Any) -> Sequence[Tensor]:
    """Returns the states in hx: an empty sequence, one state, or a pair of states."""
    if hx is None:
        return ()
    return hx if isinstance(hx, tuple | list) else (hx,)


def map_states(hx: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Applies `convert` to a state or to both states of a pair; returns None for None."""
    if isinstance(hx, tuple | list):
        return tuple(map(convert, hx))
    return None if hx is None else convert(hx)


def with_steps(arguments: Arguments, cell: Cell) -> Arguments:
    """Converts the arguments of a step module to arguments of a layer with one time step.

    Raises:
        TypeError: an argument is only for sequences.
        RuntimeError: a state or another input has more or fewer dimensions than input.
    """
    input = arguments.input
    for name in arguments.inputs:
        if name in _OF_SEQUENCES:
            raise TypeError(f"a step module takes no {name}: pass the states of this step as hx")

    def with_step(value: Tensor, name: str = "hx") -> Tensor:
        is_known = name == "hx" or name in cell.input_names
        if is_known and isinstance(value, Tensor) and value.dim() != input.dim():
            raise RuntimeError(
                f"{name} must have {input.dim()} dimensions, as input has, got {value.dim()}"
            )
        return value.unsqueeze(0)

    return Arguments(
        input.unsqueeze(0),
        map_states(arguments.hx, with_step),
        inputs={name: with_step(value, name) for name, value in given(**arguments.inputs).items()},
    )


def without_layers(state: Tensor) -> Tensor:
    """Returns a state (1, batch, hidden_size) as (batch, hidden_size).

    Squeezes in place, because callers may modify a state in place, for example by `detach_`, and a
    view does not allow that. A state from the reference path may already be a view, and stays one.
    """
    if is_compiling() or state._is_view():
        return state.squeeze(0)
    return state.squeeze_(0)
