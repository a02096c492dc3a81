"""What a step of a kernel's loop over time takes, counted in its machine code.

An instruction of an inner loop counts as often as the loop runs, where that is known from the code;
the wait for other programs counts once. Code that runs in some steps alone, as where sequences
begin, counts as if it ran in all, so the counts are an upper bound.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tools.lint.events import ATOMICS, LOADS, STORES, Event, Kernel
from tools.lint.flow import Loop
from tools.lint.machine import UnknownValueError
from tools.lint.sass import LANES, Instruction

_MOST_TURNS = 1024
_GLOBAL = LOADS | STORES
_TENSOR = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA")


class Counts(NamedTuple):
    """What one step takes; instructions as one warp issues them, bytes of a whole program."""

    instructions: int
    """Issue slots of a warp."""
    shuffles: int
    """Exchanges among the lanes of a warp."""
    barriers: int
    """Barriers of the program."""
    special: int
    """Instructions of the unit for special functions: exponentials and reciprocals."""
    tensor: int
    """Instructions of the tensor cores."""
    tensor_operations: int
    """Operations of the program on tensor cores, two for a multiply-add; 0 where the code does
    not tell the size, on Blackwell."""
    arithmetic: int
    """Additions, products and multiply-adds in float32 on the CUDA cores."""
    shared_bytes: int
    """Bytes that the program's warps read and write in shared memory, copies into it among them."""
    global_bytes: int
    """Bytes that the lanes of the program read and write in global memory: masked lanes count, and
    lanes that read the same bytes count each."""
    global_accesses: int
    """Instructions of a warp that read or write global memory, those on the counter among them."""


def count(kernel: Kernel) -> Counts:
    """Returns what a step of the loop over time takes."""
    warps = kernel.case.build.plan.warps
    found = dict.fromkeys(Counts._fields, 0)
    for place, times in executions(kernel, turns_of_loops(kernel)):
        for name, amount in _of_instruction(kernel[place], warps).items():
            found[name] += times * amount
    return Counts(**found)


def turns_of_loops(kernel: Kernel) -> dict[Loop, int]:
    """Returns how often each loop within the loop over time runs each time that it is reached.

    Raises:
        UnknownValueError: The code does not tell.
    """
    return {loop: _turns_of(kernel, loop) for loop in kernel.flow.inner(kernel.time_loop)}


def executions(kernel: Kernel, turns: Mapping[Loop, int]) -> Iterator[tuple[int, int]]:
    """Yields the places of the instructions of a step, and how often each is executed in it.

    Args:
        kernel: The kernel.
        turns: As `turns_of_loops` returns it.
    """
    for place in kernel.flow.places(kernel.time_loop.blocks):
        block = kernel.flow.block_of[place]
        if not kernel[place].never:
            yield place, math.prod(of for loop, of in turns.items() if block in loop.blocks)


def _of_instruction(at: Instruction, warps: int) -> dict[str, int]:
    """Returns what one execution of an instruction takes."""
    found = {"instructions": 1}
    one = {
        "SHFL": "shuffles",
        "MUFU": "special",
        **dict.fromkeys(("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"), "arithmetic"),
        **dict.fromkeys(_TENSOR, "tensor"),
    }.get(at.opcode)
    if one:
        found[one] = 1
    if at.opcode in ("HMMA", "HGMMA"):
        together = 4 if at.opcode == "HGMMA" else 1  # warps that execute it
        found["tensor_operations"] = 2 * warps * at.multiply_adds // together
    if at.opcode == "BAR" and "SYNC" in at.modifiers:
        found["barriers"] = 1
    if at.opcode in ("LDS", "STS", "LDGSTS"):
        found["shared_bytes"] = warps * LANES * at.bytes
    if at.opcode in ("LDSM", "STSM"):  # matrices of 8 x 8 values of 16 bits
        found["shared_bytes"] = warps * 128 * at.width
    if at.opcode in _GLOBAL:
        found["global_bytes"] = warps * LANES * at.bytes
    if at.opcode in _GLOBAL | ATOMICS:
        found["global_accesses"] = 1
    return found


def _turns_of(kernel: Kernel, loop: Loop) -> int:
    """Returns how often an inner loop runs each time that it is reached; 1 for a wait.

    Raises:
        UnknownValueError: The code does not tell.
    """
    places = list(kernel.flow.places(loop.blocks))
    if any(kernel.events.get(place) is Event.POLL for place in places):
        return 1
    opcodes = {kernel[place].opcode for place in places}
    if opcodes & {"SYNCS", "ELECT", "VOTEU"} and "BAR" not in opcodes:
        return 1  # a wait for the tensor cores, or one turn for each of the lanes that are active
    leaving = [
        block for block in loop.blocks if not loop.blocks.issuperset(kernel.flow.after[block])
    ]
    last = kernel.flow.blocks[leaving[0]][-1]
    condition = kernel[last].condition
    if len(leaving) != 1 or not condition:
        return _tiles(kernel, loop)
    goes_on = kernel.flow.block_of.get(last + 1) not in loop.blocks  # where the branch is taken
    for turn in range(_MOST_TURNS):
        holds = kernel.holds(last, condition, loop=loop, iteration=turn)
        if holds is None:
            raise UnknownValueError(str(kernel[last]))
        if holds != goes_on:
            return turn + 1
    raise UnknownValueError("a loop that runs very often")


def _tiles(kernel: Kernel, loop: Loop) -> int:
    """Returns how often the loop over tiles runs: it is the one around the loop over hidden units.

    Initial states have a second loop over hidden units, in the forward pass.
    """
    products = 2 if kernel.case.kernel == "forward" and "hx" in kernel.pointers else 1
    if sum(_turns_of(kernel, other) > 1 for other in kernel.flow.inner(loop)) != products:
        raise UnknownValueError("a loop with several ends")
    return kernel.case.build.plan.tiles
