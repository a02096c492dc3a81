"""The recurrent cells. One module per cell holds everything that the package knows about the cell.

`csrc/kernel/cells/` defines the same cells for the CPU kernels. Other code does not compare the
names of cells, except where an error repeats torch's wording.
"""

import importlib
from typing import Any

import torch

from .cell import Cell, CellName
from .gru import GRU
from .leaky import LEAKY
from .lstm import LSTM
from .vanilla import VANILLA

__all__ = ["CELLS", "GRU", "LEAKY", "LSTM", "NUMBERED", "VANILLA", "Cell", "CellName", "cell_of"]

NUMBERED = (VANILLA, GRU, LSTM, LEAKY)
"""The cells by their number in the operators."""
CELLS: dict[str, Cell] = {cell.name: cell for cell in NUMBERED}
"""The cells by name."""


def cell_of(layer: torch.nn.Module) -> Cell:
    """Returns the cell of a layer, torch's or fused."""
    classes = ((cell, cell.torch_layer) for cell in NUMBERED)
    found = (cell for cell, cls in classes if cls is not None and isinstance(layer, cls))
    return getattr(layer, "_cell", None) or next(found)


def __getattr__(name: str) -> Any:
    """Finds the step modules, which older pickles look up in this module."""
    if name in {f"{cell.layer}Cell" for cell in NUMBERED}:
        return getattr(importlib.import_module("..nn", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
