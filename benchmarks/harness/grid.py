"""The grid of `make bench`: all cells, in the order in which they are timed and reported."""

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
    "LAYERS",
    "MODES",
    "PACKED",
    "PACKED_CELLS",
    "PACKED_SHAPE",
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
SIZES = "D is the input size, H the hidden size, T the sequence length, B the batch size."
"""The legend of every table that prints these letters."""

DENSE_CELLS = tuple(
    Cell(DENSE, mode, batch, *shape) for mode in MODES for shape in SHAPES for batch in BATCHES
)
PACKED_CELLS = tuple(
    Cell(PACKED, mode, batch, *PACKED_SHAPE) for mode in MODES for batch in BATCHES
)
EPOCH_CELLS = (Cell(EPOCH, TRAINING, 64, *PACKED_SHAPE),)


def shape(cell: Cell) -> str:
    """Returns `(D, H, T)`, with `names` instead of T if the names determine the lengths."""
    sizes = f"{cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'}"
    return f"epoch ({sizes})" if cell.family == EPOCH else f"({sizes})"
