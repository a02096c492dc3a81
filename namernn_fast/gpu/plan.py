"""The rule that says how a layer runs on a GPU, from its sizes and what the device has."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device, device_of, may_round_to_tf32


class Config(NamedTuple):
    """How the recurrence of a layer is shared out among programs."""

    block_b: int
    """Sequences of a program."""
    block_n: int
    """Hidden units that it computes at once."""
    block_k: int
    """Hidden units that it sums over at once."""
    members: int
    """Programs that share the hidden units of a block of sequences."""
    tiles: int
    """Blocks of hidden units that each of them has."""
    parts: int
    """In how many parts warps share out what is summed over."""
    warps: int
    stages: int
    """Tiles of weight_hh on their way at once, where it is not kept."""
    precision: str
    """Of products in float32, as `tl.dot` has it: `ieee` or `tf32`."""

    @property
    def regime(self) -> str:
        """`resident`: one program has all of weight_hh on chip; `cooperative`: each of several has
        a part of it there; `streamed`: it is read at every step, by one program or by several."""
        if self.tiles > 1 or self.block_k < self.block_n * self.members:
            return "streamed"
        return "resident" if self.members == 1 else "cooperative"


_KEPT_IN_REGISTERS = 64  # values of weight_hh in a thread, where no tensor core takes them
# Bytes beyond which registers would not do: of more than 16 sequences where one program has all of
# weight_hh, of a slice of weight_hh and a block of states where it does not.
_LARGE_ROWS = 8 * 1024
_KEPT_WITH_ROWS = 128 * 1024


def choose(
    hidden_size: int,
    batch: int,
    dtype: torch.dtype,
    device: Device,
    *,
    directions: int = 1,
    tf32: bool = False,
) -> Config:
    """The rule: how a layer of this size runs on this device, if nothing was tuned for it.

    - weight_hh stays on chip across time if one program can hold it: in shared memory, for tensor
      cores; in float32 without TF32 in the registers of a program that has one sequence.
    - If not, but several can, and all programs of the grid can run at once, they do, and meet at a
      barrier in every step.
    - If not, it is read at every step, by as many programs for each block of sequences as can run
      at once, in the tiles for which reads and multiply-adds are estimated to take the fewest
      cycles.

    Args:
        hidden_size, batch, directions: of the layer.
        dtype: of its tensors, float32, bfloat16 or float16.
        device: what it runs on.
        tf32: whether products in float32 may be rounded to TF32.
    """
    whole = max(16, triton.next_power_of_2(hidden_size))
    if dtype.itemsize == 4 and not tf32:
        config = _choose_without_tensor_cores(hidden_size, batch * directions, whole, device)
        return config or _choose_streamed(hidden_size, batch, directions, "ieee", 4, device)
    precision = "tf32" if dtype.itemsize == 4 else "ieee"

    size = dtype.itemsize
    # As few sequences as tensor cores take, unless there are more blocks than processors.
    kept = whole * whole * size
    for block_b in (64, 32, 16):
        rows = block_b * whole * size
        few = triton.cdiv(batch, block_b // 2) * directions <= device.processors
        large = few or rows > _LARGE_ROWS
        if (block_b == 16 or not large) and kept + rows + block_b * whole * 4 <= device.shared:
            warps = _warps(max(kept // 128, rows // 32), device)
            return Config(block_b, whole, whole, 1, 1, 1, warps, 1, precision)
    for block_b, block_n in ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32)):
        kept, rows = whole * block_n * size, block_b * whole * size
        members, blocks = triton.cdiv(hidden_size, block_n), triton.cdiv(batch, block_b)
        if kept + rows > min(_KEPT_WITH_ROWS, device.shared):
            continue
        if members * blocks * directions <= device.meeting:
            warps = min(8, whole // 32)
            return Config(block_b, block_n, whole, members, 1, warps, warps, 1, precision)
    return _choose_streamed(hidden_size, batch, directions, precision, size, device)


def _warps(threads, device) -> int:
    return min(16, max(4, triton.next_power_of_2(triton.cdiv(threads, device.lanes))))


def _choose_without_tensor_cores(hidden_size, sequences, whole, device) -> Config | None:
    for threads in (128, 256, 512):
        kept = threads * _KEPT_IN_REGISTERS
        block_n = min(whole, kept // whole)
        if block_n == 0 or (block_n < whole and threads == 128):
            continue
        members = triton.cdiv(hidden_size, block_n)
        if members == 1 or members * sequences <= device.meeting:
            return Config(1, block_n, whole, members, 1, 1, threads // device.lanes, 1, "ieee")
    return None


class _Tile(NamedTuple):
    """One where weight_hh is streamed; names as in `Config`."""

    block_b: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_TILES = {
    "CUDA cores": (_Tile(16, 32, 16, 4, 3), _Tile(32, 32, 16, 4, 3), _Tile(32, 64, 16, 8, 3)),
    "tf32": (
        *(_Tile(16, 32, 32, 4, 3), _Tile(16, 64, 32, 4, 3), _Tile(32, 64, 32, 4, 3)),
        _Tile(64, 64, 32, 8, 2),
    ),
    "16 bits": (
        *(_Tile(16, 32, 64, 4, 3), _Tile(16, 64, 64, 4, 3), _Tile(32, 64, 64, 4, 3)),
        *(_Tile(64, 64, 64, 8, 2), _Tile(64, 128, 64, 8, 2)),
    ),
}
# What is known of an H100, in bytes and cycles: what a processor reads of L2 in one, the part of
# all processors that can at the same time, and a barrier among programs.
_PORT = 64
_READING = 0.6
_BARRIER = 2600


def _choose_streamed(hidden_size, batch, directions, precision, itemsize, device) -> Config:
    """The tiles with which a step takes the fewest cycles, by estimate."""
    without_cores = itemsize == 4 and precision == "ieee"
    kind = "CUDA cores" if without_cores else "tf32" if itemsize == 4 else "16 bits"
    found: dict[Config, float] = {}
    for block_b, block_n, block_k, warps, stages in _TILES[kind]:
        read = (block_b + block_n) * itemsize  # for each unit that is summed over
        if stages * read * block_k > device.shared:
            continue
        blocks = triton.cdiv(batch, block_b) * directions
        tiles = triton.cdiv(hidden_size, block_n)
        members = min(tiles, max(1, device.meeting // blocks))
        members = triton.next_power_of_2(members + 1) // 2  # so that tiles come out even
        tiles = triton.cdiv(tiles, members)
        programs = members * blocks
        busy = min(1, programs / device.processors)
        cycles = read / _PORT * max(1, busy / _READING)
        if without_cores:  # by the instructions of the compiled loops, four a cycle
            cycles = max(cycles, (block_b * block_n + 180) / 90)
        cycles *= hidden_size * tiles * triton.cdiv(programs, device.processors)
        config = Config(block_b, block_n, block_k, members, tiles, 1, warps, stages, precision)
        found[config] = cycles + (_BARRIER if members > 1 else 0)
    return min(found, key=lambda config: found[config])


class Size(NamedTuple):
    """What a configuration is chosen by."""

    hidden_size: int
    batch: int
    dtype: torch.dtype
    device: Device
    directions: int
    tf32: bool

    @functools.cache  # noqa: B019 - it keeps a few numbers for each size
    def choose(self) -> Config:
        return choose(
            *(self.hidden_size, self.batch, self.dtype, self.device),
            directions=self.directions,
            tf32=self.tf32,
        )


tuned: dict[Size, Config] = {}


def size_of(hidden_size: int, batch: int, like: Tensor, directions: int) -> Size:
    device = device_of(like)
    tf32 = like.dtype == torch.float32 and may_round_to_tf32(device)
    return Size(hidden_size, batch, like.dtype, device, directions, tf32)


def configuration(hidden_size: int, batch: int, like: Tensor, directions: int) -> Config:
    """What `autotune` found for a layer of this size, else what the rule says."""
    size = size_of(hidden_size, batch, like, directions)
    return tuned.get(size) or size.choose()
