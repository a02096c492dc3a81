"""The recurrent cells. One module per cell holds everything that the package knows about the cell.

`csrc/cells/` defines the same cells for the CPU kernels. Other code never branches on the name of a
cell, except to repeat torch's wording in errors.
"""

from typing import Literal, TypeAlias

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
    "called_with",
    "cell_of",
]

NUMBERED: list[Cell] = [VANILLA, GRU, LSTM, LEAKY]
"""The cells, indexed by `Cell.number`. Tests append cells that only builds for tests compile."""
CELLS: dict[str, Cell] = {cell.name: cell for cell in NUMBERED}
"""The cells by name."""
WithOneState: TypeAlias = Literal["rnn", "gru"]
WithTwoStates: TypeAlias = Literal["lstm", "leaky"]
CellName: TypeAlias = Literal[WithOneState, WithTwoStates]
"""The name of a cell, as users pass it."""


def cell_of(layer: torch.nn.Module) -> Cell:
    """Returns the cell that a layer computes, torch's or fused."""
    found = (cell for cell in NUMBERED if cell.torch and isinstance(layer, cell.torch.layer))
    return getattr(layer, "_cell", None) or next(found)


def called_with(name: str) -> str:
    """Returns the names of the cells that take this input, for error messages; "" if none does."""
    return " or ".join(cell.name for cell in NUMBERED if name in cell.input_names)
