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

__all__ = [
    "BASELINE",
    "BATCHES",
    "DENSE",
    "DENSE_CELLS",
    "EPOCH",
    "EPOCH_CELLS",
    "FAMILIES",
    "FORWARD",
    "FUSED",
    "GRU_CELLS",
    "GRU_CELLS_OF_RECORDS",
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
# By shape: the batches of `nn.GRU` that every run times, a third of its cells.
GRU_BATCHES = {
    (64, 64, 8): (1,),
    (64, 256, 8): (1, 16),
    (128, 128, 128): (1, 64),
    (512, 512, 128): (64,),
    (*PACKED_SHAPE, None): (16, 256),
}
# A round of both layers takes half a minute there.
TOO_LONG_FOR_GRU = ((512, 512, 128), 1024)


def _sizes(cell: Cell) -> tuple[tuple[int, int, int | None], int]:
    return (cell.input_size, cell.hidden_size, cell.seq_len), cell.batch


_OF_GRU = tuple(
    replace(cell, kind="gru")
    for cell in (*DENSE_CELLS, *PACKED_CELLS)
    if _sizes(cell) != TOO_LONG_FOR_GRU
)
GRU_CELLS = tuple(c for c in _OF_GRU if c.batch in GRU_BATCHES.get(_sizes(c)[0], ()))
"""The cells of `nn.GRU` that every run times."""
GRU_CELLS_OF_RECORDS = tuple(cell for cell in _OF_GRU if cell not in GRU_CELLS)
"""Its other cells, timed only in a run that records."""
EPOCH_CELLS = (Cell(EPOCH, TRAINING, 64, *PACKED_SHAPE),)


def shape(cell: Cell) -> str:
    """Returns `(D, H, T)`, with `names` instead of T if the names determine the lengths."""
    sizes = f"{cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'}"
    return f"epoch ({sizes})" if cell.family == EPOCH else f"({sizes})"
