"""The recurrent cells. One module per cell holds everything that the package knows about the cell.

`csrc/cells/` defines the same cells for the CPU kernels. Other code never branches on the name of a
cell, except to repeat torch's wording in errors.
"""

from typing import Literal, Protocol, TypeAlias

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


def cell_passed(cell: CellName | HasCell) -> Cell:
    """Returns the cell that a user passes as an argument `cell`.

    Raises:
        ValueError: the argument is neither a cell's name nor a `RecurrentCell`.
    """
    found = CELLS.get(cell) if isinstance(cell, str) else getattr(cell, "_cell", None)
    if not isinstance(found, Cell):
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
