"""What PyTorch runs in the place of the layer, and what a loop of library calls takes at least."""

import math
from typing import NamedTuple

from benchmarks.gpu.h100 import H100, rate
from benchmarks.gpu.model import BYTES
from benchmarks.harness.grid import PACKED, Cell

SMALL_H, STANDARD = "PERSIST_STATIC_SMALL_H", "STANDARD"
# Hidden units up to which PyTorch chooses `SMALL_H` for tanh and relu.
_LARGEST = {"forward": 384, "backward": 256}


def algorithm(cell: Cell, kernel: str) -> str:
    """Returns the algorithm of cuDNN that PyTorch chooses for `nn.RNN`, in float32 and bfloat16.

    That is `get_algo` in aten/src/ATen/native/cudnn/RNN.cpp of PyTorch at commit 00fc08aa.

    Args:
        cell: The cell.
        kernel: `forward` or `backward`.
    """
    small = cell.family != PACKED and cell.hidden_size <= _LARGEST[kernel]
    return SMALL_H if small else STANDARD


_TILE = 128  # rows and columns of the tiles of a product


class Loop(NamedTuple):
    """The least seconds of a step that is a library's product and a pointwise kernel."""

    product: float
    pointwise: float

    @property
    def seconds(self) -> float:
        """With two gaps of a graph's nodes."""
        return self.product + self.pointwise + 2 * rate("node")

    def gap_of_a_tie(self, other: float) -> float:
        """Returns the gap between nodes with which a step takes as long as another one."""
        return (other - self.product - self.pointwise) / 2


def loop(cell: Cell, precision: str) -> Loop:
    """Returns the least time of a forward step that is two kernels of a captured loop.

    The product runs at the peak, or at the rate at which L2 feeds tiles of 128 x 128 values; the
    pointwise kernel at the rate of L2 and of device memory.
    """
    batch, hidden, width = cell.batch, cell.hidden_size, BYTES[precision]
    states = batch * hidden
    of_rate = rate(precision) * H100.processors * rate("clock")
    read = hidden**2 * math.ceil(batch / _TILE) + states * math.ceil(hidden / _TILE)
    return Loop(
        product=max(states * hidden / of_rate, width * (read + states) / rate("l2")),
        # The pointwise kernel reads the product and the projected rows, and writes states.
        pointwise=width * max(3 * states / rate("l2"), 2 * states / rate("hbm")),
    )
