"""Cells of a benchmark: each compares two layers at one combination of sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

FORWARD = "forward"
TRAINING = "forward + backward"
MODES = (FORWARD, TRAINING)

DENSE = "dense"
PACKED = "packed"

BASELINE = "nn.RNN"
FUSED = "FusedRNN"
LAYERS = (BASELINE, FUSED)

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

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Cell":
        """Returns the cell of a row of raw results, which contains the cell's fields."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        sizes = {"D": self.input_size, "H": self.hidden_size, "T": self.seq_len, "B": self.batch}
        written = "-".join(f"{letter}{size}" for letter, size in sizes.items() if size is not None)
        return f"{self.family}-{self.mode.replace(' ', '')}-{written}"

    @property
    def row_work(self) -> int:
        """The maximum number of multiply-adds of the forward pass of one sequence."""
        return (
            (self.seq_len or LONGEST_NAME) * self.hidden_size * (self.input_size + self.hidden_size)
        )

    @property
    def is_small(self) -> bool:
        """Whether a quick run times this cell, in either mode."""
        return 3 * self.batch * self.row_work <= QUICK_WORK
