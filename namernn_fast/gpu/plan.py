"""The plan of a layer on a GPU, made from the sizes of the layer and properties of the device."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .device import Device, device_of, may_round_to_tf32


class Plan(NamedTuple):
    """How the recurrence of a layer is divided among programs."""

    block_b: int
    """Sequences per program."""
    block_n: int
    """Hidden units that a program computes at once."""
    block_k: int
    """Hidden units that a program sums over at once."""
    warps: int
    """Warps per program."""
    members: int = 1
    """Programs that split the hidden units of a block of sequences."""
    tiles: int = 1
    """Blocks of hidden units per member."""
    parts: int = 1
    """Parts that the sum over hidden units is split into, for different warps."""
    stages: int = 1
    """Tiles of weight_hh in flight at once, if weight_hh is streamed."""
    precision: str = "ieee"
    """The `input_precision` of `tl.dot` for float32 products: `ieee` or `tf32`."""
    stepwise: bool | None = None
    """Whether torch, if possible, computes the product of each step instead of a streamed kernel.
    None means only if torch is estimated to be faster."""

    @property
    def kind(self) -> str:
        """Where weight_hh is while the recurrence runs.

        `resident`: one program keeps all of weight_hh on chip; `cooperative`: each of several
        members keeps a part of weight_hh on chip; `streamed`: every step reads all of weight_hh.
        """
        if self.tiles > 1 or self.block_k < self.block_n * self.members:
            return "streamed"
        return "resident" if self.members == 1 else "cooperative"

    def runs_stepwise(self, hidden_size: int, batch: int, is_captured: bool) -> bool:
        """Returns whether torch, instead of a streamed kernel, computes the product of each step.

        `is_captured`: whether a CUDA graph captures the call. Replays have no launch overhead.
        """
        if self.kind != "streamed":
            return False
        if self.stepwise is not None:
            return self.stepwise
        if hidden_size < _UNITS_THAT_PAY[self.precision]:
            return False
        return is_captured or batch * hidden_size**2 >= _HIDES_THE_HOST


FEWEST_UNITS_OF_STEPS = 512
"""The fewest hidden units for which one torch product per step can be faster than one kernel."""
# The two limits below are estimates for an H100, not measurements. The step time of a streamed
# kernel was derived from its machine code. Torch's step time is a sum of three estimates: a product
# at the data sheet's peak rate or at L2 bandwidth, an activation at memory bandwidth, and 1 µs
# between the kernels of a CUDA graph. With _UNITS_THAT_PAY or more hidden units, torch's step takes
# 0.3 to 0.8 times as long as the kernel's step; with fewer units, at least 0.87 times as long.
_UNITS_THAT_PAY = {"ieee": 512, "tf32": 1024}
# A step with this many multiply-adds keeps the GPU busy while the host launches the next two
# kernels. At the rates above, such a step takes 9 µs in float32 and 5 µs in TF32. In an eager call
# with shorter steps, the GPU would wait for the host.
_HIDES_THE_HOST = 2**28
_KEPT_IN_REGISTERS = 64  # Values of weight_hh that each thread keeps without tensor cores.
# Limits in bytes above which registers spill. _LARGE_STATES limits the states in a program that
# keeps all of weight_hh and has more than 16 sequences. _KEPT_WITH_STATES limits a member's part
# of weight_hh plus a block of states.
_LARGE_STATES = 8 * 1024
_KEPT_WITH_STATES = 128 * 1024


class Size(NamedTuple):
    """The sizes of a layer and the properties of its tensors that determine a plan."""

    hidden_size: int
    batch: int
    """Number of sequences."""
    dtype: torch.dtype
    """The dtype of all tensors: float32, bfloat16 or float16."""
    device: Device
    directions: int = 1
    tf32: bool = False
    """Whether float32 operands of products may be rounded to TF32."""

    def blocks(self, sequences: int) -> int:
        """Returns the number of blocks in all directions, with `sequences` sequences per block."""
        blocks: int = triton.cdiv(self.batch, sequences)
        return blocks * self.directions


@functools.cache
def choose(size: Size) -> Plan:
    """Returns the default plan for a layer of this size on its device.

    - `resident` if one program can keep weight_hh on chip: in shared memory for tensor cores, or,
      in float32 without TF32, in the registers of a program with one sequence.
    - Else `cooperative` if several programs together can keep weight_hh on chip, and all programs
      of the grid can run at once, because programs meet at a barrier in every step.
    - Else `streamed`. Each block of sequences gets as many programs as can run at once. They use
      the tile size that is estimated to need the fewest cycles for reads and multiply-adds.
    """
    device, itemsize = size.device, size.dtype.itemsize
    whole = max(16, triton.next_power_of_2(size.hidden_size))
    if itemsize == 4 and not size.tf32:
        return _choose_without_tensor_cores(size, whole) or _choose_streamed(size)
    precision = "tf32" if itemsize == 4 else "ieee"

    # Use the smallest blocks of sequences that tensor cores support, unless there would be more
    # blocks than SMs.
    kept = whole * whole * itemsize
    for block_b in (64, 32, 16):
        states = block_b * whole * itemsize
        few = size.blocks(block_b // 2) <= device.processors
        large = few or states > _LARGE_STATES
        if (block_b == 16 or not large) and kept + states + block_b * whole * 4 <= device.shared:
            warps = _warps(max(kept // 128, states // 32), device)
            return Plan(block_b, whole, whole, warps, precision=precision)
    for block_b, block_n in ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32)):
        kept, states = whole * block_n * itemsize, block_b * whole * itemsize
        members = triton.cdiv(size.hidden_size, block_n)
        if kept + states > min(_KEPT_WITH_STATES, device.shared):
            continue
        if members * size.blocks(block_b) <= device.meeting:
            warps = min(8, whole // 32)
            return Plan(
                block_b, block_n, whole, warps, members=members, parts=warps, precision=precision
            )
    return _choose_streamed(size)


def _warps(threads: int, device: Device) -> int:
    """Returns the number of warps for about `threads` threads: at least 4 and at most 16."""
    warps: int = triton.next_power_of_2(triton.cdiv(threads, device.lanes))
    return min(16, max(4, warps))


def _choose_without_tensor_cores(size: Size, whole: int) -> Plan | None:
    """Returns a plan with weight_hh in registers, or None if weight_hh does not fit."""
    device = size.device
    for threads in (128, 256, 512):
        kept = threads * _KEPT_IN_REGISTERS
        block_n = min(whole, kept // whole)
        if block_n == 0 or (block_n < whole and threads == 128):
            continue
        members = triton.cdiv(size.hidden_size, block_n)
        if members == 1 or members * size.batch * size.directions <= device.meeting:
            return Plan(1, block_n, whole, warps=threads // device.lanes, members=members)
    return None


# Tiles of streamed weights: block_b, block_n, block_k, warps, stages.
_TILES = {
    "CUDA cores": ((16, 32, 16, 4, 3), (32, 32, 16, 4, 3), (32, 64, 16, 8, 3)),
    "tf32": ((16, 32, 32, 4, 3), (16, 64, 32, 4, 3), (32, 64, 32, 4, 3), (64, 64, 32, 8, 2)),
    "16 bits": (
        (16, 32, 64, 4, 3),
        (16, 64, 64, 4, 3),
        (32, 64, 64, 4, 3),
        (64, 64, 64, 8, 2),
        (64, 128, 64, 8, 2),
    ),
}
# Properties of an H100.
_PORT = 64  # bytes that an SM reads from L2 per cycle
_READING = 0.6  # fraction of all SMs that can read at the rate _PORT at the same time
_BARRIER = 2600  # cycles of a barrier among programs


def _choose_streamed(size: Size) -> Plan:
    """Returns the streamed plan whose step is estimated to take the fewest cycles."""
    device, itemsize = size.device, size.dtype.itemsize
    kind = "16 bits" if itemsize == 2 else "tf32" if size.tf32 else "CUDA cores"
    found: dict[Plan, float] = {}
    for block_b, block_n, block_k, warps, stages in _TILES[kind]:
        read = (block_b + block_n) * itemsize  # bytes read per hidden unit of the sum
        if stages * read * block_k > device.shared:
            continue
        blocks = size.blocks(block_b)
        tiles = triton.cdiv(size.hidden_size, block_n)
        members = min(tiles, max(1, device.meeting // blocks))
        members = triton.next_power_of_2(members + 1) // 2  # so tiles divide evenly among members
        tiles = triton.cdiv(tiles, members)
        programs = members * blocks
        busy = min(1, programs / device.processors)
        cycles = read / _PORT * max(1, busy / _READING)
        if kind == "CUDA cores":  # cycles of the compiled loops, at four instructions per cycle
            cycles = max(cycles, (block_b * block_n + 180) / 90)
        cycles *= size.hidden_size * tiles * triton.cdiv(programs, device.processors)
        plan = Plan(
            block_b,
            block_n,
            block_k,
            warps,
            members=members,
            tiles=tiles,
            stages=stages,
            precision="tf32" if kind == "tf32" else "ieee",
        )
        found[plan] = cycles + (_BARRIER if members > 1 else 0)
    return min(found, key=lambda plan: found[plan])


tuned: dict[Size, Plan] = {}
"""The plans that `autotune` found in this process."""


def size_of(hidden_size: int, batch: int, like: Tensor, directions: int) -> Size:
    """Returns the `Size` of a layer with the device and dtype of `like`."""
    device = device_of(like)
    tf32 = like.dtype == torch.float32 and may_round_to_tf32(device)
    return Size(hidden_size, batch, like.dtype, device, directions, tf32)


def plan_of(hidden_size: int, batch: int, like: Tensor, directions: int) -> Plan:
    """Returns the plan that `autotune` found for a layer of this size, or the default plan."""
    size = size_of(hidden_size, batch, like, directions)
    return tuned.get(size) or choose(size)
