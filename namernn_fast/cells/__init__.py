"""The recurrent cells. One module per cell holds everything that the package knows about the cell.

`csrc/cells/` defines the same cells for the CPU kernels. Other code never branches on the name of a
cell, except to repeat torch's wording in errors.
"""

from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypeAlias

import torch

from .cell import Cell
from .gru import GRU
from .leaky import LEAKY
from .lstm import LSTM
from .vanilla import VANILLA

__all__ = [
    "CELLS",
    "GRU",
    "LEAKY",
    "LSTM",
    "NUMBERED",
    "VANILLA",
    "Cell",
    "CellName",
    "HasCell",
    "called_with",
    "cell_of",
    "cell_passed",
    "only",
    "user_cell",
]

NUMBERED: list[Cell] = [VANILLA, GRU, LSTM, LEAKY]
"""The cells, indexed by `Cell.number`. Tests append cells that only builds for tests compile."""
CELLS: dict[str, Cell] = {cell.name: cell for cell in NUMBERED}
"""The cells by name."""
WithOneState: TypeAlias = Literal["rnn", "gru"]
WithTwoStates: TypeAlias = Literal["lstm", "leaky"]
CellName: TypeAlias = Literal[WithOneState, WithTwoStates]
"""The name of a cell, as users pass it."""


class HasCell(Protocol):
    """A cell that a user wrote as an equation, as users pass it: a `namernn_fast.RecurrentCell`."""

    _cell: Cell

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Computes one step."""


def user_cell(cell: object) -> Cell | None:
    """Returns the cell that a `RecurrentCell` describes, or None for any other value."""
    described = getattr(cell, "_cell", None)
    return described if isinstance(described, Cell) else None


def cell_passed(cell: CellName | HasCell) -> Cell:
    """Returns the cell that a user passes as an argument `cell`.

    Raises:
        ValueError: the argument is neither a cell's name nor a `RecurrentCell`.
    """
    found = CELLS.get(cell) if isinstance(cell, str) else user_cell(cell)
    if found is None:
        names = ", ".join(CELLS)
        raise ValueError(f"cell must be one of {names}, or a recurrent_cell, got {cell!r}")
    return found


def cell_of(layer: torch.nn.Module) -> Cell:
    """Returns the cell that a layer computes, torch's or fused."""
    found = (cell for cell in NUMBERED if cell.torch and isinstance(layer, cell.torch.layer))
    return getattr(layer, "_cell", None) or next(found)


def called_with(name: str) -> str:
    """Returns the names of the cells that take this input, for error messages; "" if none does."""
    return " or ".join(cell.name for cell in NUMBERED if name in cell.input_names)


def only(names: Iterable[str]) -> str:
    """Returns the end of an error about an unknown argument, which lists the known names if any."""
    listed = ", ".join(names)
    return f", only {listed}" if listed else ""
