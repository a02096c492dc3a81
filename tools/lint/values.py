"""Where values come from: reaching definitions, the arguments of an address, and small evaluations.

The bank of constants `c[0x0]` holds the kernel's arguments, from a place on that depends on the
architecture.
"""

import re
import struct
from collections.abc import Iterable
from functools import cache, cached_property
from typing import NamedTuple

from tools.lint.flow import Flow
from tools.lint.sass import Instruction, next_register, registers

# Where the arguments begin, by the first digits of the architecture.
_ARGUMENTS_AT = {"sm_8": 0x160, "sm_9": 0x210, "sm_10": 0x380, "sm_12": 0x380}
UNKNOWN = "unknown"
_LOADS = {"LDG", "LD", "ATOM", "ATOMG"}


class Argument(NamedTuple):
    """An argument of a kernel in the bank of constants."""

    name: str
    begin: int
    end: int


def arguments_of(arch: str, signature: Iterable[tuple[str, int]]) -> list[Argument]:
    """Returns where the arguments are.

    Args:
        arch: as `sm_90`.
        signature: The name and the bytes of each argument, in order.
    """
    place = next(at for prefix, at in _ARGUMENTS_AT.items() if arch.startswith(prefix))
    found = []
    for name, size in signature:
        place = -(-place // size) * size
        found.append(Argument(name, place, place + size))
        place += size
    return found


class Values:
    """Answers where the values of a kernel come from."""

    def __init__(self, flow: Flow, arguments: list[Argument]):
        self.flow = flow
        self.arguments = arguments
        self._results = [at.results for at in flow.instructions]
        self.origins_of_address = cache(self._origins_of_address)
        self.origins = cache(self._origins)

    def writers(self, place: int, name: str) -> list[int]:
        """Returns the places that may have written what a register or predicate holds at a place.

        Args:
            place: Where it is read.
            name: The register or the predicate.
        """
        found: list[int] = []
        block = self.flow.block_of[place]
        guard = self.flow.instructions[place].guard  # as long as no other value is in the predicate
        waiting = [(block, place)]
        seen = set()
        while waiting:
            block, end = waiting.pop()
            for at in range(end - 1, self.flow.blocks[block].start - 1, -1):
                instruction = self.flow.instructions[at]
                if guard and guard.lstrip("!") in self._results[at]:
                    guard = ""
                if not instruction.never and name in self._results[at]:
                    found.append(at)
                    if instruction.guard in ("", guard):
                        break
            else:
                guard = ""
                for before in self.flow.before[block]:
                    if before not in seen:
                        seen.add(before)
                        waiting.append((before, self.flow.blocks[before].stop))
        return sorted(set(found))

    def _origins(self, place: int, name: str) -> frozenset[str]:
        """Returns what the value of a register or predicate is made from.

        That is names of arguments, of special registers as `SR_TID.X`, and `unknown` where it is
        read from memory that is no argument. Values in global memory are not followed: they are
        indices.
        """
        found: set[str] = set()
        waiting, seen = [(place, name)], set()
        while waiting:
            place, name = waiting.pop()
            for writer in self.writers(place, name):
                if (writer, name) in seen:
                    continue
                seen.add((writer, name))
                own, further = self._direct(writer, name)
                found |= own
                waiting += further
        return frozenset(found)

    def _direct(self, place: int, name: str) -> tuple[set[str], list[tuple[int, str]]]:
        """Returns what an instruction makes one of its results from.

        Returns:
            Origins, and registers and predicates to follow, each with the place that reads it.
        """
        at = self.flow.instructions[place]
        if at.opcode in ("S2R", "S2UR", "CS2R"):
            return {at.source_operands[0]} - {"SRZ"}, []
        if at.opcode in _LOADS:
            return set(), []
        if at.opcode == "LDL":
            return set(), self.spilled.get(slot(at, at.results.index(name)), [])
        if at.opcode in ("LDS", "LDSM"):
            return {UNKNOWN}, []
        if at.opcode in ("LDC", "ULDC", "LDCU"):
            by = 4 * at.results.index(name)
            return {self._argument(read + by) for read in self._constants_of(place)} - {""}, []
        further = [*at.sources]
        if at.opcode.endswith(("SETP", "LOP3", "P2R")):
            further += at.source_predicates
        origins = {self._argument(read) for read in at.constants} - {""}
        return origins, [(place, other) for other in further]

    @cached_property
    def spilled(self) -> dict[str, list[tuple[int, str]]]:
        """The registers that are stored in local memory, by their place there."""
        found: dict[str, list[tuple[int, str]]] = {}
        for place in self.flow.block_of:
            at = self.flow.instructions[place]
            if at.opcode == "STL":
                for name in registers(at.operands[1]):
                    for i in range(at.width):
                        stored = found.setdefault(slot(at, i), [])
                        stored.append((place, next_register(name, i)))
        return found

    def _constants_of(self, place: int) -> list[int]:
        """Returns the places in the bank of constants that a load of a constant may read."""
        operand = self.flow.instructions[place].source_operands[0]
        found = re.fullmatch(r"c\[0x0\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]", operand)
        if not found:
            return []
        begin = int(found[2] or "0", 16)
        return [begin + by for by in self._choices(place, found[1])] if found[1] else [begin]

    def _choices(self, place: int, name: str) -> list[int]:
        """Returns the constants that a register may hold, as far as they are moved or selected."""
        found = []
        for writer in self.writers(place, name):
            at = self.flow.instructions[writer]
            if at.opcode.removeprefix("U") in ("SEL", "MOV", "IMAD"):
                for operand in at.source_operands:
                    if operand.startswith("0x"):
                        found.append(int(operand, 16))
                    for other in registers(operand):
                        found += self._choices(writer, other)
            elif at.opcode == "HFMA2":
                found.append(halves(at))
        return found

    def _argument(self, place: int) -> str:
        """Returns the name of the argument at a place, or "" where none is."""
        return next((a.name for a in self.arguments if a.begin <= place < a.end), "")

    def _origins_of_address(self, place: int) -> frozenset[str]:
        """Returns the arguments that the address of an access to global memory is made from."""
        found: frozenset[str] = frozenset()
        for name in self.flow.instructions[place].address:
            found |= self.origins(place, name)
        return found


def halves(at: Instruction) -> int:
    """Returns a constant that is moved as two numbers of 16 bits: `-RZ, RZ, high, low`."""
    high, low = (float(operand) for operand in at.source_operands[2:4])
    return int.from_bytes(struct.pack("<ee", low, high), "little")


def slot(at: Instruction, word: int) -> str:
    """Returns the place in local memory of one of the words that an access moves."""
    operand = next(operand for operand in at.operands if operand.startswith("["))
    base, _, by = operand.strip("[]").partition("+")
    return f"{base}+{int(by or '0', 16) + 4 * word:#x}"
