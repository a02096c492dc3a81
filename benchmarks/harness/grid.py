"""The grid of `make bench`: every cell, in the order in which it is timed and reported."""

from namernn_fast.bench.cells import (
    BASELINE,
    DENSE,
    FORWARD,
    FUSED,
    LAYERS,
    LONGEST_NAME,
    MODES,
    PACKED,
    TRAINING,
    Cell,
)

__all__ = [
    "BASELINE",
    "BATCHES",
    "DENSE",
    "DENSE_CELLS",
    "EPOCH",
    "EPOCH_BATCH",
    "EPOCH_CELLS",
    "FAMILIES",
    "FORWARD",
    "FUSED",
    "LAYERS",
    "LONGEST_NAME",
    "MODES",
    "PACKED",
    "PACKED_CELLS",
    "PACKED_SHAPE",
    "SHAPES",
    "TRAINING",
    "Cell",
    "shape",
]

EPOCH = "epoch"
FAMILIES = (DENSE, PACKED, EPOCH)

BATCHES = (1, 16, 64, 256, 1024)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 128))
PACKED_SHAPE = (64, 256)
EPOCH_BATCH = 64

DENSE_CELLS = tuple(
    Cell(DENSE, mode, batch, *shape) for mode in MODES for shape in SHAPES for batch in BATCHES
)
PACKED_CELLS = tuple(
    Cell(PACKED, mode, batch, *PACKED_SHAPE) for mode in MODES for batch in BATCHES
)
EPOCH_CELLS = (Cell(EPOCH, TRAINING, EPOCH_BATCH, *PACKED_SHAPE),)


def shape(cell: Cell) -> str:
    """Returns `(D, H, T)`, with `names` in the place of T where the names determine it."""
    sizes = f"{cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'}"
    return f"epoch ({sizes})" if cell.family == EPOCH else f"({sizes})"
