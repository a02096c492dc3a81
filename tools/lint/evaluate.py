"""Computes a value of a kernel by executing the few integer instructions that it is made from."""

from collections.abc import Mapping

from tools.lint.flow import Loop
from tools.lint.machine import WORD, Machine, UnknownValueError
from tools.lint.sass import Instruction
from tools.lint.values import Values, slot

_MOST_INSTRUCTIONS = 400
_MOST_RELOADS = 8


def evaluate(
    values: Values,
    place: int,
    name: str,
    *,
    thread: int | None = None,
    loop: Loop | None = None,
    iteration: int = 0,
    given: Mapping[int, int] | None = None,
) -> int:
    """Returns what a register or a predicate holds at a place.

    Args:
        values: Of the kernel.
        place: Where it is read.
        name: The register or the predicate.
        thread: The number of the thread, where it may matter.
        loop: The loop around the place, if its iteration may matter.
        iteration: The iteration, from 0.
        given: Results of instructions that read memory, by place.

    Raises:
        UnknownValueError: It cannot be computed.
    """
    given = given or {}
    needed, flags = _slice(values, place, name, given, loop)
    inside = set(values.flow.places(loop.blocks)) if loop else set()
    _check_inner_loops(values, place, needed & inside)
    machine = Machine(values, thread, given, flags)
    for at in sorted(needed - inside):
        if at < min(inside, default=place):
            machine.execute(at)
    for i in range(iteration + 1):
        for at in sorted(needed & inside):
            if i < iteration or at < place:
                machine.execute(at)
    return machine.register(name)


def _check_inner_loops(values: Values, place: int, inside: set[int]) -> None:
    """Refuses what is computed in an inner loop that is over: each iteration is executed once."""
    block = values.flow.block_of[place]
    for loop in values.flow.loops:
        if block not in loop.blocks and any(
            values.flow.block_of[at] in loop.blocks for at in inside
        ):
            raise UnknownValueError("it is computed in an inner loop")


def _slice(
    values: Values, place: int, name: str, given: Mapping[int, int], loop: Loop | None
) -> tuple[set[int], set[int]]:
    """Returns the places of the instructions that a value is made from.

    Where a bit of a register is a flag, only the instructions that set and clear that bit count.

    Returns:
        All places, and those that set or clear a flag.
    """
    found: set[int] = set()
    flags: set[int] = set()
    waiting: list[tuple[int, str, int]] = [
        (place, name, 0)
    ]  # at the end the bits that are asked for
    seen = set(waiting)
    while waiting:
        reader, name, bits = waiting.pop()
        for writer in values.writers(reader, name):
            if _is_reload(values, writer, reader):
                continue
            at = values.flow.instructions[writer]
            further: list[tuple[int, str, int]] = []
            changed = _changed_bits(at, name) if bits else None
            if changed is not None and not changed & bits:
                further = [(reader if writer == reader else writer, name, bits)]
            else:
                if loop is None and writer >= reader:
                    raise UnknownValueError(f"{name} changes from iteration to iteration")
                found.add(writer)
                if changed is not None:
                    flags.add(writer)
                    further = [(writer, guard, 0) for guard in at.source_predicates]
                elif writer not in given:
                    further = _read(values, writer)
            waiting += [item for item in further if item not in seen]
            seen |= set(further)
            if len(found) > _MOST_INSTRUCTIONS:
                raise UnknownValueError("too many instructions")
    # What is stored in local memory is executed as well.
    for writer in list(found):
        at = values.flow.instructions[writer]
        if at.opcode == "LDL":
            found |= {stored for stored, _ in values.spilled.get(slot(at, 0), [])}
    return found, flags


def _is_reload(values: Values, writer: int, reader: int) -> bool:
    """Returns whether a predicate is what `reader` saved of it, perhaps by way of other registers:
    `P2R R0, PR, RZ, 0x1` and later `ISETP.NE.AND P0, PT, R0, RZ, PT`."""
    for _ in range(_MOST_RELOADS):
        at = values.flow.instructions[writer]
        if at.name != "ISETP.NE.AND" or at.source_operands[1] != "RZ":
            return False
        saving = values.writers(writer, at.source_operands[0])
        if len(saving) != 1:
            return False
        saved = values.flow.instructions[saving[0]]
        if saved.opcode != "P2R" or saved.moved != at.results[:1]:
            return False
        if saving == [reader]:
            return True
        writers = values.writers(saving[0], saved.moved[0])
        if len(writers) != 1:
            return False
        (writer,) = writers
    return False


def _read(values: Values, place: int) -> list[tuple[int, str, int]]:
    """Returns the registers and predicates that an instruction reads, each with the bits of it."""
    at = values.flow.instructions[place]
    if at.opcode == "LDL":
        return [(stored, name, 0) for stored, name in values.spilled.get(slot(at, 0), [])]
    bits = 0
    if at.name == "LOP3.LUT" and at.results[0].startswith("P") and at.source_operands[3] == "0xc0":
        mask = at.source_operands[1]
        bits = int(mask, 16) if mask.startswith("0x") else 0
    names = [(place, name, bits) for name in at.sources]
    return names + [(place, name, 0) for name in at.source_predicates]


def _changed_bits(at: Instruction, name: str) -> int | None:
    """Returns the bits of a register that an instruction sets or clears; None if it does more."""
    operands = at.source_operands
    if at.name != "LOP3.LUT" or at.results != [name] or operands[0] != name:
        return None
    if not operands[1].startswith("0x") or operands[2] != "RZ":
        return None
    mask = int(operands[1], 16)
    return {"0xc0": ~mask & WORD, "0xfc": mask}.get(operands[3])
