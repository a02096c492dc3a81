"""The grid of cells that `speed` times: 20 dense and 5 packed shapes, forward and in training."""

from dataclasses import dataclass

FORWARD = "forward"
TRAINING = "forward+backward"
BATCHES = (1, 16, 64, 256, 1024)
SHAPES = ((64, 64, 8), (64, 256, 8), (128, 128, 128), (512, 512, 128))
PACKED_SHAPE = (64, 256)
# The lengths of a packed batch, which are like those of surnames.
MEAN_LENGTH, SPREAD, LONGEST = 7, 2, 20


@dataclass(frozen=True)
class Cell:
    """Sizes and a mode; `seq_len` 0 is a packed batch of sequences as long as surnames."""

    mode: str
    batch: int
    input_size: int
    hidden_size: int
    seq_len: int = 0

    @property
    def name(self) -> str:
        """The mode and sizes in words."""
        layout, steps = ("dense", f" T{self.seq_len}") if self.seq_len else ("packed", "")
        return f"{layout} {self.mode} D{self.input_size} H{self.hidden_size}{steps} B{self.batch}"

    @property
    def work(self) -> float:
        """The multiply-adds of a call, about."""
        steps = self.seq_len or MEAN_LENGTH
        passes = 3 if self.mode == TRAINING else 1
        return passes * steps * self.batch * self.hidden_size * (self.input_size + self.hidden_size)


CELLS = {
    cell.name: cell
    for mode in (FORWARD, TRAINING)
    for batch in BATCHES
    for cell in (
        *(Cell(mode, batch, *shape) for shape in SHAPES),
        Cell(mode, batch, *PACKED_SHAPE),
    )
}
