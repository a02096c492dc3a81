"""The grid of `make bench`: all cells, in the order in which they are timed and reported."""

from dataclasses import replace

from namernn_fast.bench.cells import (
    BASELINE,
    DENSE,
    FORWARD,
    FUSED,
    LAYERS,
    MODES,
    PACKED,
    TRAINING,
    Cell,
    Layers,
)
from namernn_fast.cells import CELLS

__all__ = [
    "BASELINE",
    "BATCHES",
    "CELLS_OF_EVERY_RUN",
    "DENSE",
    "DENSE_CELLS",
    "EPOCH",
    "EPOCH_CELLS",
    "FAMILIES",
    "FORWARD",
    "FUSED",
    "GATED_CELLS",
    "GATED_KINDS",
    "LAYERS",
    "MODES",
    "PACKED",
    "PACKED_CELLS",
    "PACKED_SHAPE",
    "ROLES",
    "SHAPES",
    "SIZES",
    "TRAINING",
    "Cell",
    "shape",
]

EPOCH = "epoch"
FAMILIES = (DENSE, PACKED, EPOCH)

BATCHES = (1, 16, 64, 256, 1024)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 128))
PACKED_SHAPE = (64, 256)
ROLES = Layers._fields
"""What a layer is in its cell: "baseline" or "fused"."""
SIZES = "D is the input size, H the hidden size, T the sequence length, B the batch size."
"""The legend of every table that prints these letters."""

DENSE_CELLS = tuple(
    Cell(DENSE, mode, batch, *shape) for mode in MODES for shape in SHAPES for batch in BATCHES
)
PACKED_CELLS = tuple(
    Cell(PACKED, mode, batch, *PACKED_SHAPE) for mode in MODES for batch in BATCHES
)
GATED_KINDS = tuple(kind for kind, cell in CELLS.items() if cell.weight_blocks > 1)
# By shape: the batches that every run times of the vanilla layer, and of each layer with gates.
BATCHES_OF_EVERY_RUN = {
    (64, 64, 8): ((1, 64, 1024), (1,)),
    (64, 256, 8): ((1, 16, 256), (16,)),
    (128, 128, 128): ((1, 64), (1,)),
    (512, 512, 128): ((16, 64), (64,)),
    (*PACKED_SHAPE, None): ((1, 16, 256), (16, 256)),
}
# A round of both layers takes half a minute there.
TOO_LONG_WITH_GATES = ((512, 512, 128), 1024)


def _sizes(cell: Cell) -> tuple[tuple[int, int, int | None], int]:
    return (cell.input_size, cell.hidden_size, cell.seq_len), cell.batch


GATED_CELLS = tuple(
    replace(cell, kind=kind)
    for kind in GATED_KINDS
    for cell in (*DENSE_CELLS, *PACKED_CELLS)
    if _sizes(cell) != TOO_LONG_WITH_GATES
)
"""The cells of `nn.GRU` and `nn.LSTM`."""
CELLS_OF_EVERY_RUN = tuple(
    cell
    for cell in (*DENSE_CELLS, *PACKED_CELLS, *GATED_CELLS)
    if cell.batch in BATCHES_OF_EVERY_RUN[_sizes(cell)[0]][cell.kind in GATED_KINDS]
)
"""The cells of layers that every run times; a run that records times all cells."""
EPOCH_CELLS = (Cell(EPOCH, TRAINING, 64, *PACKED_SHAPE),)


def shape(cell: Cell) -> str:
    """Returns `(D, H, T)`, with `names` instead of T if the names determine the lengths."""
    sizes = f"{cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'}"
    return f"epoch ({sizes})" if cell.family == EPOCH else f"({sizes})"
