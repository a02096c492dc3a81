"""Arguments that the kernels of both passes share, each written once."""

from typing import Any, NamedTuple

VARYING = ["V", "T", "B", "N", "time_stride", "batch_stride"]
VARYING += ["reset_time_stride", "reset_batch_stride"]
"""Arguments that vary from call to call: a kernel is not compiled anew for their values.

Triton would compile a kernel for the values of numbers within a tuple, so they are no part of one.
"""


class LayoutTensors(NamedTuple):
    """The tensors that tell which (time, sequence) rows exist."""

    lengths: Any
    """int64 (B), or None: T steps each."""
    offsets: Any
    """int64 (B + 1), the first row of each sequence, or None."""
    starts: Any
    """int64 (T), the number of rows before each time, or None."""
    reset: Any
    """At (t * reset_time_stride + b * reset_batch_stride): not 0 where a state begins anew; or
    None."""


class Form(NamedTuple):
    """What a kernel is compiled for."""

    H: int
    """Hidden units."""
    DIRECTIONS: int
    TANH: bool
    """Whether the nonlinearity is tanh; else it is relu."""
    PADDED: bool
    """Whether rows past the end of sequences are to be zeroed."""
    RING: bool
    """Whether h_n alone is wanted, and output is memory to work in."""
    BLOCK_B: int
    """Sequences of a program."""
    BLOCK_N: int
    """Hidden units that a program computes at once."""
    BLOCK_K: int
    """Hidden units that a program sums over at once."""
    MEMBERS: int
    """Programs that share out the hidden units of a block of sequences."""
    TILES: int
    """Blocks of hidden units of each member."""
    PARTS: int
    """Into how many parts the sum over hidden units is split, for different warps."""
    VECTOR: int
    """Hidden units side by side that a thread sums over, in products of one sequence."""
    STAGES: int
    """Tiles of weight_hh on their way at once, where weight_hh is streamed."""
    PRECISION: str
    """Of products in float32, as `tl.dot` has it."""
    TRANSPOSED: bool
    """Whether weight_hh is given as its transpose, in the forward pass."""
    KEEP_WEIGHT: bool
    """Whether a program keeps its part of weight_hh on chip across time."""
    KEEP_STATE: bool
    """Whether a program keeps the state of its sequences on chip across time."""
    WIDTH: int
    """Columns of a row: the hidden units of all directions."""
    LIMIT: int | None
    """The hidden units, or None where blocks of units leave no remainder."""


class Program(NamedTuple):
    """What a program of either pass knows before its first step."""

    member: Any
    """The number of the program among the members of its block of sequences."""
    direction: Any
    """The direction; in the forward pass the second one goes back in time."""
    group: Any
    """The number of the block of sequences among those of all directions."""
    back: Any
    """1 where this pass goes back in time, else 0."""
    b: Any
    """The sequences of the block [B]."""
    T: Any
    """The time steps."""
    B: Any
    """The sequences of all blocks."""
    steps: Any
    """The steps of the block's longest sequence."""
    length: Any
    """The steps of each sequence [B]."""
    first: Any
    """The row of each sequence at time 0 [B]; with `starts` its place among the rows of a time."""
    time_stride: Any
    reset_time_stride: Any
    reset_batch_stride: Any


class Step(NamedTuple):
    """How each sequence of a block is at one time, in the order of the pass [B]."""

    alive: Any
    """Whether the sequence has a step at this time."""
    begins: Any
    """Whether that is its first step."""
    goes_on: Any
    """Whether that is a later step."""
    is_cut: Any
    """Whether the state begins anew between the step before and this one."""
