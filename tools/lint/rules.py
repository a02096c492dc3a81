"""All rules of the lint that look at one kernel alone; budgets are in `budgets.py`."""

from collections.abc import Iterator

from tools.lint import exchange, ranges
from tools.lint.cases import UNALIGNED
from tools.lint.events import ATOMICS, COUNTER, LOADS, STORES, WEIGHTS, Finding, Kernel

_LOCAL = {"LDL", "STL"}
_REGISTERS = 65536  # of a processor
_MOST_SEQUENCES = 1 << 20


def check(kernel: Kernel) -> Iterator[Finding]:
    """Yields every rule that a kernel breaks."""
    if kernel.time_loop is None:
        yield Finding("loop", "there is no loop over time")
        return
    yield from _attribution(kernel)
    yield from exchange.check(kernel)
    yield from _weights(kernel)
    yield from _local_memory(kernel)
    yield from _limits(kernel)
    yield from _indices(kernel)


def _attribution(kernel: Kernel) -> Iterator[Finding]:
    """Checks that it is known what each access to global memory belongs to.

    One that may belong to several arguments is subject to the rules of each, but the counter must
    be told apart.
    """
    for place in kernel.reachable:
        at = kernel[place]
        if at.opcode in LOADS | STORES | ATOMICS and not at.never:
            memory = kernel.memory_of(place)
            if "unknown" in memory or (COUNTER in memory and len(memory) > 1):
                names = " or ".join(sorted(memory)) or "nothing"
                yield Finding("attribution", f"the address of {at} comes from {names}")


def _weights(kernel: Kernel) -> Iterator[Finding]:
    """Checks that weights that are kept on chip are not read in every step."""
    if kernel.case.build.plan.kind == "streamed":
        return
    for place in kernel.flow.places(kernel.time_loop.blocks):
        if kernel[place].opcode in LOADS and kernel.memory_of(place) & WEIGHTS:
            yield Finding("weights", f"weights are read in every step: {kernel[place]}")


def _local_memory(kernel: Kernel) -> Iterator[Finding]:
    """Checks that nothing is spilled, in loops above all.

    Pointers that are not divisible by 16, as those of views into odd places, take more registers:
    such kernels may spill, and what a step of them takes is in the record.
    """
    if kernel.case.rows == UNALIGNED:
        return
    in_loops = {block for loop in kernel.flow.loops for block in loop.blocks}
    looped = [place for place in kernel.flow.places(in_loops) if kernel[place].opcode in _LOCAL]
    if looped:
        yield Finding(
            "local", f"{len(looped)} accesses to local memory in a loop: {kernel[looped[0]]}"
        )
    if kernel.taken.spilled:
        yield Finding("local", f"a thread has {kernel.taken.spilled} bytes of local memory")


def _limits(kernel: Kernel) -> Iterator[Finding]:
    """Checks that a processor has the shared memory and the registers of a program."""
    plan, device, taken = kernel.case.build.plan, kernel.case.build.device, kernel.taken
    if taken.shared > device.shared:
        yield Finding("limits", f"{taken.shared} bytes of shared memory, of {device.shared}")
    registers = -(-taken.registers // 8) * 8 * device.lanes * plan.warps
    if registers > _REGISTERS:
        yield Finding("limits", f"{registers} registers of a program, of {_REGISTERS}")


def _indices(kernel: Kernel) -> Iterator[Finding]:
    """Checks that no index of 32 bits overflows, with up to 2^20 sequences and any strides."""
    plan, directions = kernel.case.build.plan, kernel.case.directions
    programs = plan.members * directions * -(-_MOST_SEQUENCES // plan.block_b)
    for line in ranges.overflows(kernel.ttir, programs):
        yield Finding("index", f"may overflow: {line}")
