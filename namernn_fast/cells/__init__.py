"""The recurrent cells: one module for each, which says all that the package knows about it.

`csrc/kernel/cells/` says the same to the CPU kernels. Nothing else compares the names of cells,
except for errors that repeat the wording of torch.
"""

import importlib
from typing import Any

import torch

from .cell import Cell, CellName
from .elman import ELMAN
from .gru import GRU
from .lstm import LSTM

__all__ = ["CELLS", "ELMAN", "GRU", "LSTM", "NUMBERED", "Cell", "CellName", "cell_of"]

NUMBERED = (ELMAN, GRU, LSTM)
"""The cells by their number in the operators."""
CELLS: dict[str, Cell] = {cell.name: cell for cell in NUMBERED}
"""The cells by name."""


def cell_of(layer: torch.nn.Module) -> Cell:
    """Returns the cell of a layer, torch's or fused."""
    return next(cell for cell in NUMBERED if isinstance(layer, cell.torch_layer))


def __getattr__(name: str) -> Any:
    """Finds the step modules, which older pickles look up in this module."""
    if name in {f"{cell.layer}Cell" for cell in NUMBERED}:
        return getattr(importlib.import_module("..step_modules", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
