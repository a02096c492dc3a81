"""The recurrent cells: one module for each, which says all that the package knows about it.

`csrc/kernel/cells/` says the same to the CPU kernels. Nothing else compares the names of cells.
"""

import importlib
from typing import Any

import torch

from .cell import Cell, LayerWeights
from .elman import ELMAN
from .gru import GRU
from .lstm import LSTM

__all__ = ["CELLS", "ELMAN", "GRU", "LSTM", "NUMBERED", "Cell", "LayerWeights", "cell_of"]

NUMBERED = (ELMAN, GRU, LSTM)
"""The cells by their number in the operators."""
CELLS = {cell.name: cell for cell in NUMBERED}
"""The cells by name."""


def cell_of(layer: torch.nn.Module) -> Cell:
    """Returns the cell of a layer, torch's or fused."""
    return next(cell for cell in NUMBERED if isinstance(layer, cell.torch_layer))


def __getattr__(name: str) -> Any:
    """Finds the step modules for pickles from when this was the module that defined them."""
    if name in {f"{cell.layer}Cell" for cell in NUMBERED}:
        return getattr(importlib.import_module("..step_modules", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
