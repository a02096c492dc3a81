"""Cells of a benchmark: each compares two layers at one combination of sizes.

A cell here is a cell of the grid of sizes. The kind of a layer, which the rest of the package calls
its cell, is `Cell.kind`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..cells import CELLS, ELMAN

FORWARD = "forward"
TRAINING = "forward + backward"
MODES = (FORWARD, TRAINING)

DENSE = "dense"
PACKED = "packed"


class Layers(NamedTuple):
    """The names of the two layers that a cell compares."""

    baseline: str
    fused: str


LAYERS_OF = {
    name: Layers(f"nn.{cell.torch_layer.__name__}", cell.layer) for name, cell in CELLS.items()
}
"""The layers by the name of their cell."""
LAYERS = BASELINE, FUSED = LAYERS_OF[ELMAN.name]

LONGEST_NAME = 20
# Maximum multiply-adds of a training step in a quick run.
QUICK_WORK = 4 * 10**8

SIZES = "D input features, H hidden units, T time steps, B sequences in a batch"
"""The meaning of the letters in the name of a cell, in tables and in plots."""


@dataclass(frozen=True)
class Cell:
    """One comparison of two layers; `seq_len` is None if the lengths vary."""

    family: str
    mode: str
    batch: int
    input_size: int
    hidden_size: int
    seq_len: int | None = None
    kind: str = ELMAN.name

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Cell":
        """Returns the cell of a row of raw results, which contains the cell's fields.

        Older results have no `kind`: they are of `nn.RNN`.
        """
        named = {field.name: row[field.name] for field in fields(cls) if field.name != "kind"}
        return cls(**named, kind=row.get("kind", ELMAN.name))

    def __str__(self) -> str:
        sizes = {"D": self.input_size, "H": self.hidden_size, "T": self.seq_len, "B": self.batch}
        written = "-".join(f"{letter}{size}" for letter, size in sizes.items() if size is not None)
        name = f"{self.family}-{self.mode.replace(' ', '')}-{written}"
        return name if self.kind == ELMAN.name else f"{self.kind}-{name}"

    @property
    def layers(self) -> Layers:
        """The names of both layers."""
        return LAYERS_OF[self.kind]

    @property
    def row_work(self) -> int:
        """The maximum number of multiply-adds of the forward pass of one sequence."""
        columns = CELLS[self.kind].weight_blocks * self.hidden_size
        return (self.seq_len or LONGEST_NAME) * columns * (self.input_size + self.hidden_size)

    @property
    def is_small(self) -> bool:
        """Whether a quick run times this cell, in either mode."""
        return 3 * self.batch * self.row_work <= QUICK_WORK
