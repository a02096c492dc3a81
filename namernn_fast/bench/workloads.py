"""The workloads of a benchmark: each compares two layers at one combination of sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ..cells import CELLS, VANILLA

FORWARD = "forward"
TRAINING = "forward + backward"
MODES = (FORWARD, TRAINING)

DENSE = "dense"
PACKED = "packed"


class Layers(NamedTuple):
    """The names of the two layers that a workload compares."""

    baseline: str
    fused: str


LAYERS_OF = {
    name: Layers(f"nn.{cell.torch_name}", cell.layer)
    for name, cell in CELLS.items()
    if cell.torch is not None
}
"""The names of torch's layer and the fused layer, by the name of their cell."""
GATES = {name: cell.gates for name, cell in CELLS.items()}
"""The number of blocks of hidden_size rows in the weights of a layer, by the name of its cell."""
LAYERS = BASELINE, FUSED = LAYERS_OF[VANILLA.name]

LONGEST_NAME = 20
# Maximum multiply-adds of a training step in a quick run.
QUICK_WORK = 4 * 10**8

SIZES = "D input features, H hidden units, T time steps, B sequences in a batch"
"""The meaning of the letters in the names of workloads, in tables and in plots."""


@dataclass(frozen=True)
class Workload:
    """One comparison of two layers; `seq_len` is None if the lengths vary."""

    family: str
    mode: str
    batch: int
    input_size: int
    hidden_size: int
    seq_len: int | None = None
    cell: str = VANILLA.name
    """The name of the layers' recurrent cell: "rnn", "gru" or "lstm", or what `--cell` names."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Workload":
        """Returns the workload of a row of raw results; other columns of the row are ignored."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        sizes = {"D": self.input_size, "H": self.hidden_size, "T": self.seq_len, "B": self.batch}
        written = "-".join(f"{letter}{size}" for letter, size in sizes.items() if size is not None)
        name = f"{self.family}-{self.mode.replace(' ', '')}-{written}"
        return name if self.cell == VANILLA.name else f"{self.cell}-{name}"

    @property
    def options(self) -> dict[str, Any]:
        """The constructor arguments of both layers, except their sizes."""
        return {}

    @property
    def layers(self) -> Layers:
        """The names of torch's layer and the fused layer."""
        return LAYERS_OF[self.cell]

    @property
    def row_work(self) -> int:
        """The maximum number of multiply-adds in the forward pass of one sequence."""
        columns = GATES[self.cell] * self.hidden_size
        return (self.seq_len or LONGEST_NAME) * columns * (self.input_size + self.hidden_size)

    @property
    def is_small(self) -> bool:
        """Whether a quick run includes this workload, in either mode."""
        return 3 * self.batch * self.row_work <= QUICK_WORK
