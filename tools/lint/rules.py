"""The rules of the lint. Each rule checks one kernel. docs/gpu_report.md lists the rules."""

import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu import resources
from tools.gpu.machine_code import LOADS, Code, Instruction, code_of
from tools.lint import ranges
from tools.lint.variants import UNALIGNED, Variant

_REGISTERS = 65536  # per multiprocessor
_MOST_SEQUENCES = 1 << 20
# Functions that load a tile of weight_hh have names with this ending.
_TILE = "_tile("
# Maps patterns for the names of kernels that are known to spill to the reasons.
SPILLING = {
    r"float32 H\d+ cooperative \S+w16 forward": "with 512 threads each has 128 registers, and 64 "
    "hold weights",
    r"TF32 H\d*[13579] .* backward": "rows of an odd hidden size are not aligned, so a thread "
    "holds units of many rows",
}


class Finding(NamedTuple):
    """A rule that a kernel breaks."""

    rule: str
    message: str


class Built(NamedTuple):
    """A compiled variant of a kernel."""

    variant: Variant
    taken: resources.Resources
    code: Code
    source: Path
    """The folder of the kernels' files."""
    ttir: str
    """Triton's first intermediate representation."""


def build(variant: Variant, kernel=None, **settings: Any) -> Built:
    """Compiles a variant, optionally with another `kernel` or other compile `settings`."""
    kernel = kernel or resources.KERNELS[variant.kernel]
    specialisation, device = variant.specialisation, variant.build.device
    source = resources.source_of(kernel, specialisation, aligned=variant.rows != UNALIGNED)
    compiled = resources.compiled(device, source, {**specialisation.settings, **settings})
    return Built(
        variant,
        resources.resources_of(device, compiled),
        code_of(compiled.asm["cubin"]),
        Path(kernel.fn.__code__.co_filename).parent,
        compiled.asm["ttir"],
    )


def check(built: Built) -> Iterator[Finding]:
    """Yields every rule that a kernel breaks."""
    yield from _local(built)
    yield from _limits(built)
    yield from _index(built)
    if not built.code.loops:
        yield Finding("loop", "there is no loop over time")
        return
    yield from _weights(built)
    yield from _call(built)
    yield from _tensor(built)


def known_spill(built: Built) -> str:
    """Returns the known reason why a kernel spills, or an empty string."""
    reasons = (why for pattern, why in SPILLING.items() if re.search(pattern, built.variant.name))
    return next(reasons, "") if built.taken.spilled else ""


def _local(built: Built) -> Iterator[Finding]:
    """Checks that nothing is spilled.

    Kernels for pointers not divisible by 16 may spill: they need more registers but run rarely.
    """
    variant, spilled = built.variant, built.taken.spilled
    if spilled and variant.rows != UNALIGNED and not known_spill(built):
        yield Finding("local", f"a thread has {spilled} bytes of local memory")


def _limits(built: Built) -> Iterator[Finding]:
    """Checks that a program fits in the shared memory and the registers of a multiprocessor."""
    plan, device, taken = built.variant.build.plan, built.variant.build.device, built.taken
    if taken.shared > device.shared:
        yield Finding("limits", f"{taken.shared} bytes of shared memory, limit {device.shared}")
    registers = -(-taken.registers // 8) * 8 * device.lanes * plan.warps
    if registers > _REGISTERS:
        yield Finding("limits", f"{registers} registers in a program, limit {_REGISTERS}")


def _index(built: Built) -> Iterator[Finding]:
    """Checks that no 32-bit index overflows, with up to 2^20 sequences and any strides."""
    plan, directions = built.variant.build.plan, built.variant.directions
    programs = plan.members * directions * -(-_MOST_SEQUENCES // plan.block_b)
    for line in ranges.overflows(built.ttir, programs):
        yield Finding("index", f"may overflow: {line}")


def _weights(built: Built) -> Iterator[Finding]:
    """Checks that weights kept on chip are not read in every step."""
    if built.variant.build.plan.kind == "streamed":
        return
    loads = [load for load in built.code.instructions if _loads_weights(built, load)]
    if not loads:
        yield Finding("weights", f"no load comes from a call of {_TILE}")
    repeated = sorted({*loads} & {*built.code.step})
    if repeated:
        yield Finding("weights", f"{len(repeated)} loads of weights in every step: {repeated[0]}")


def _loads_weights(built: Built, instruction: Instruction) -> bool:
    """Returns whether an instruction is a load by `_tile`, according to its source lines.

    The line of the load itself is ignored, because Triton's inline assembly shifts it.
    """
    calls = (linecache.getline(str(built.source / file), line) for file, line in instruction.calls)
    return instruction.opcode in LOADS and any(_TILE in text for text in calls)


def _call(built: Built) -> Iterator[Finding]:
    """Checks that no step calls a function. The compiler makes such calls for 64-bit divisions."""
    for instruction in built.code.step:
        if instruction.opcode == "CALL" and instruction.target.startswith("$"):
            yield Finding("call", f"a step calls a function: {instruction}")


def _tensor(built: Built) -> Iterator[Finding]:
    """Checks that a step uses tensor cores if and only if it multiplies several sequences in
    16 bits or in TF32."""
    build = built.variant.build
    expected = build.plan.block_b > 1 and build.precision != "float32"
    count = built.code.count().tensor
    if expected != bool(count):
        yield Finding("tensor", f"{count} products on tensor cores in {build.precision}")
