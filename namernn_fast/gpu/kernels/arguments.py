"""Types for the arguments that the forward and backward kernels share."""

from typing import Any, NamedTuple

VARYING = ["V", "T", "B", "N", "time_stride", "batch_stride"]
VARYING += ["reset_time_stride", "reset_batch_stride"]
"""Arguments that vary from call to call, so kernels are not specialised for their values.

Kernels take these arguments one by one, because Triton specialises a kernel for numbers in tuples.
"""


class LayoutTensors(NamedTuple):
    """The tensors that say which (time, sequence) rows exist."""

    lengths: Any
    """int64 (B), the number of steps of each sequence, or None."""
    offsets: Any
    """int64 (B + 1), the first row of each sequence and the end of the last sequence, or None."""
    starts: Any
    """int64 (T), the number of rows before each time step, or None."""
    reset: Any
    """Nonzero at (t * reset_time_stride + b * reset_batch_stride) if sequence b restarts from a
    zero state at time t. None without resets."""


class Form(NamedTuple):
    """The compile-time constants of a kernel."""

    H: int
    """Hidden units."""
    DIRECTIONS: int
    TANH: bool
    """Whether the nonlinearity is tanh; otherwise it is relu."""
    PADDED: bool
    """Whether to zero rows past the end of sequences."""
    RING: bool
    """Whether only h_n is needed, and output is scratch memory for two steps."""
    BLOCK_B: int
    """Sequences per program."""
    BLOCK_N: int
    """Hidden units that a program computes at once."""
    BLOCK_K: int
    """Hidden units that a program sums over at once."""
    MEMBERS: int
    """Programs that split the hidden units of a block of sequences."""
    TILES: int
    """Blocks of hidden units per member."""
    PARTS: int
    """Parts that the sum over hidden units is split into, for different warps."""
    VECTOR: int
    """Adjacent hidden units that a thread sums over, in the product of a single sequence."""
    STAGES: int
    """Tiles of weight_hh in flight at once, if weight_hh is streamed."""
    PRECISION: str
    """The `input_precision` of `tl.dot` for float32 products: `ieee` or `tf32`."""
    TRANSPOSED: bool
    """Whether the forward kernel gets the transpose of weight_hh."""
    KEEP_WEIGHT: bool
    """Whether a program keeps its part of weight_hh on chip across time."""
    KEEP_STATE: bool
    """Whether a program keeps the state of its sequences on chip across time."""
    WIDTH: int
    """Columns of a row: the hidden units of all directions."""
    LIMIT: int | None
    """The number of hidden units, or None if blocks of units divide it evenly."""


class Program(NamedTuple):
    """The values that stay constant while a program runs, in either pass."""

    member: Any
    """The index of the program among the members of its block of sequences."""
    direction: Any
    """The direction, 0 or 1; in the forward pass direction 1 goes back in time."""
    group: Any
    """The index of the block of sequences among the blocks of all directions."""
    back: Any
    """1 if this pass goes back in time, else 0."""
    b: Any
    """The sequences of the block [B]."""
    T: Any
    """The number of time steps."""
    B: Any
    """The number of sequences in all blocks."""
    steps: Any
    """The number of steps of the block's longest sequence."""
    length: Any
    """The number of steps of each sequence [B]."""
    first: Any
    """The row of each sequence at time 0 [B]; with `starts`, the sequence's index in a step."""
    time_stride: Any
    reset_time_stride: Any
    reset_batch_stride: Any


class Step(NamedTuple):
    """The status of each sequence [B] of a block at one time step."""

    alive: Any
    """Whether the sequence has a step at this time."""
    begins: Any
    """Whether this is the first step of the sequence that the pass computes."""
    goes_on: Any
    """Whether the sequence is alive and the pass has already computed one of its steps."""
    is_cut: Any
    """Whether a reset cuts the sequence between the step just computed and this step."""
