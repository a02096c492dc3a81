"""The checked arguments of the GPU operators: a stack of layers and the layout of its rows."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import ops
from ..cells import VANILLA
from ..cells.cell import LayerWeights


class SequenceLayout(NamedTuple):
    """Which (time, sequence) rows of a call exist, and where each row is in memory.

    Strides are in rows, except the strides of reset, which are in elements.
    """

    T: int
    """Number of time steps; for a jagged tensor, an upper bound."""
    B: int
    """Number of sequences."""
    N: int
    """Number of rows."""
    time_stride: int
    batch_stride: int
    lengths: Tensor | None = None
    """int64 (B), the number of steps of each sequence. None if every sequence has T steps, or if
    `offsets` determines the lengths."""
    offsets: Tensor | None = None
    """int64 (B + 1), the first row of each sequence of a jagged tensor, then the end of the last
    sequence. None for other layouts."""
    starts: Tensor | None = None
    """int64 (T), the number of rows before each time step in packed data; else None."""
    reset: Tensor | None = None
    """uint8, nonzero for each (time, sequence) at which the state restarts from zeros. None without
    resets."""
    reset_time_stride: int = 0
    reset_batch_stride: int = 0

    @property
    def padded(self) -> bool:
        """Whether tensors may have rows past the end of sequences."""
        return self.lengths is not None and self.starts is None

    @property
    def is_whole(self) -> bool:
        """Whether every row exists and no reset cuts a sequence."""
        optional = (self.lengths, self.offsets, self.starts, self.reset)
        return all(tensor is None for tensor in optional)

    @property
    def consecutive(self) -> bool:
        """Whether `is_whole` holds and the rows are in time-major order."""
        return self.batch_stride == 1 and self.is_whole


class Stack(NamedTuple):
    """A stack of layers and the layout of its rows, for both passes."""

    layout: SequenceLayout
    hx: Tensor | None
    """Initial states (num_layers * directions, B, H), contiguous, or None for zeros."""
    weights: Sequence[Tensor]
    """The flat list of weights, contiguous."""
    options: int
    """The option bits of the operator."""
    directions: int
    hidden_size: int

    def layers(self) -> list[tuple[Tensor | None, list[LayerWeights]]]:
        """Returns for each layer its initial states and the weights of its directions."""
        layers = ops.layers_of(VANILLA, self.weights, self.options)
        states = [None] * len(layers) if self.hx is None else self.hx.chunk(len(layers))
        return list(zip(states, layers, strict=True))


class BackwardTensors(NamedTuple):
    """The tensors that the backward recurrence of a layer reads and writes."""

    hx: Tensor | None
    """Initial states (directions, B, H), or None for zeros."""
    weights_hh: Sequence[Tensor]
    """The recurrent weights of each direction (H, H)."""
    output: Tensor
    """The output of the forward pass, (N, directions * H)."""
    grad_output: Tensor | None
    """The gradient of output, shaped like output, or None for zeros."""
    grad_h_n: Tensor | None
    """The gradient of the last states, (directions, B, H), or None for zeros."""
    dz: Tensor
    """Receives the gradient of the pre-activations, shaped like output."""
    previous_states: Tensor | None
    """Receives the previous state h_{t-1} of each row, shaped like output; None if not needed."""
    grad_hx: Tensor | None
    """Receives the gradient of hx, (directions, B, H); None if not needed."""
