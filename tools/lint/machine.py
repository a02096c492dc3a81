"""Executes integer instructions of a kernel, one after the other."""

import operator
import re
from collections.abc import Callable, Mapping

from tools.lint.sass import Instruction
from tools.lint.values import Values, halves, slot

WORD = (1 << 32) - 1
_LONG = (1 << 64) - 1
_COMPARE = {name: getattr(operator, name.lower()) for name in ("LT", "GT", "LE", "GE", "EQ", "NE")}


class UnknownValueError(Exception):
    """A value depends on what is known at run time alone, or on an instruction not known here."""


class Machine:
    """Executes integer instructions on registers."""

    def __init__(
        self, values: Values, thread: int | None, given: Mapping[int, int], flags: set[int]
    ):
        self.values, self.thread, self.given, self.flags = values, thread, given, flags
        self.state: dict[str, int] = {}
        self.spilled: dict[str, int] = {}

    def execute(self, place: int) -> None:
        """Executes the instruction at a place; raises UnknownValueError if that cannot be done."""
        at = self.values.flow.instructions[place]
        if at.never or (at.guard and not self.predicate(at.guard)):
            return
        if place in self.given:
            result = self.given[place]
        elif place in self.flags:
            result = _flag(self.state.get(at.results[0], 0), at)
        elif at.opcode == "STL":
            self.spilled[slot(at, 0)] = self.register(at.operands[1])
            return
        elif at.opcode == "LDL" and slot(at, 0) in self.spilled and at.width == 1:
            result = self.spilled[slot(at, 0)]
        else:
            function = _FUNCTIONS.get(at.opcode.removeprefix("U")) or _FUNCTIONS.get(at.opcode)
            if function is None:
                raise UnknownValueError(str(at))
            result = function(self, at)
        self._write(at, result)

    def _write(self, at: Instruction, result: int) -> None:
        if at.opcode == "R2P":
            for name in at.results:
                self.state[name] = result >> int(name[1:]) & 1
            return
        names = [name for name in at.results if "P" not in name]
        for i, name in enumerate(names):
            self.state[name] = (result >> (32 * i)) & WORD
        predicates = [name for name in at.results if "P" in name and not name.endswith("T")]
        if predicates:
            if at.opcode in ("LOP3", "ULOP3"):
                self.state[predicates[0]] = int(result & WORD != 0)
            else:  # a comparison, or a carry
                self.state[predicates[0]] = (result >> (32 * len(names))) & 1

    def predicate(self, operand: str) -> int:
        """Returns 1 where a predicate is set."""
        name = operand.lstrip("!")
        if name.endswith("T"):
            value = 1
        elif name in self.state:
            value = self.state[name]
        else:
            raise UnknownValueError(name)
        return value ^ operand.startswith("!")

    def read(self, operand: str, bits: int = 32) -> int:
        """Returns the value of an operand, without a sign."""
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
            return int(operand, 0) & (_LONG if bits == 64 else WORD)
        found = re.fullmatch(r"(-|~)?(U?R(?:\d+|Z))(?:\.64)?", operand)
        if not found:
            raise UnknownValueError(operand)
        sign, name = found[1], found[2]
        value = self.register(name)
        if bits == 64 and not name.endswith("Z"):
            kind, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
            value |= self.register(f"{kind}{number + 1}") << 32
        mask = _LONG if bits == 64 else WORD
        return {"-": -value, "~": ~value, None: value}[sign] & mask

    def register(self, name: str) -> int:
        """Returns what a register or a predicate holds."""
        if name.endswith("Z"):
            return 0
        if name not in self.state:
            raise UnknownValueError(name)
        return self.state[name]


def _flag(value: int, at: Instruction) -> int:
    mask = int(at.source_operands[1], 16)
    return value & mask if at.source_operands[3] == "0xc0" else value | mask


def _operands(at: Instruction) -> list[str]:
    """Returns the operands that are no predicates."""
    return [name for name in at.source_operands if not re.fullmatch(r"!?U?P[0-9T]", name)]


def _carries(machine: Machine, at: Instruction) -> int:
    """Returns the carry that an instruction adds."""
    if "X" not in at.modifiers:
        return 0
    return sum(machine.predicate(name) for name in at.source_predicates if name != at.guard)


def _bits(at: Instruction) -> int:
    return 64 if {"64", "S64", "U64"} & set(at.modifiers) else 32


def _special(machine: Machine, at: Instruction) -> int:
    if at.source_operands[0] == "SRZ":
        return 0
    if machine.thread is not None:
        if at.source_operands[0] == "SR_TID.X":
            return machine.thread
        if at.source_operands[0] == "SR_LANEID":
            return machine.thread % 32
    raise UnknownValueError(at.source_operands[0])


def _vote(machine: Machine, at: Instruction) -> int:
    """Returns the lanes that are active: the compiler lets one lane add for all that are active.

    The thread is taken to be the only one of its warp; others would add for themselves.
    """
    if machine.thread is None or "ANY" not in at.modifiers or at.source_operands != ["PT"]:
        raise UnknownValueError(str(at))
    return 1 << machine.thread % 32


def _count_bits(machine: Machine, at: Instruction) -> int:
    return bin(machine.read(at.source_operands[0])).count("1")


def _highest_bit(machine: Machine, at: Instruction) -> int:
    return (machine.read(at.source_operands[0]).bit_length() - 1) & WORD


def _move_halves(machine: Machine, at: Instruction) -> int:
    if at.source_operands[:2] != ["-RZ", "RZ"]:
        raise UnknownValueError(str(at))
    return halves(at)


def _predicates(machine: Machine, at: Instruction) -> int:
    names = [name for name in at.source_predicates if name != at.guard]
    return sum(machine.predicate(name) << int(name[1:]) for name in names)


def _move(machine: Machine, at: Instruction) -> int:
    return machine.read(_operands(at)[0], _bits(at))


def _add(machine: Machine, at: Instruction) -> int:
    return sum(machine.read(name, _bits(at)) for name in _operands(at)) + _carries(machine, at)


def _multiply_add(machine: Machine, at: Instruction) -> int:
    left, right, added = _operands(at)
    wide = "WIDE" in at.modifiers
    a, b = machine.read(left), machine.read(right)
    if "HI" in at.modifiers:
        raise UnknownValueError(str(at))
    if wide and "U32" not in at.modifiers:
        a, b = _signed(a), _signed(b)
    product = a * b + machine.read(added, 64 if wide else 32) + _carries(machine, at)
    return product & (_LONG if wide else WORD)


def _shift(machine: Machine, at: Instruction) -> int:
    low, by, high = (machine.read(name) for name in _operands(at))
    if "L" in at.modifiers:
        both = (high << 32 | low) << by
        return (both >> 32 if "HI" in at.modifiers else both) & WORD
    value = _signed(high) if "S32" in at.modifiers else high
    if "HI" in at.modifiers:
        return (value >> by) & WORD
    return ((high << 32 | low) >> by) & WORD


def _scaled_add(machine: Machine, at: Instruction) -> int:
    names = _operands(at)
    by = machine.read(names[-1])
    carry = _carries(machine, at)
    if "HI" in at.modifiers:
        low, added, high = (machine.read(name) for name in names[:3])
        return (((high << 32 | low) << by) >> 32) + added + carry
    return (machine.read(names[0]) << by) + machine.read(names[1]) + carry


def _logic(machine: Machine, at: Instruction) -> int:
    a, b, c, table = (machine.read(name) for name in _operands(at)[:4])
    found = 0
    for i in range(8):
        if table >> i & 1:
            terms = (x if i >> (2 - j) & 1 else ~x for j, x in enumerate((a, b, c)))
            found |= next(terms) & next(terms) & next(terms)
    return found & WORD


def _low_bits(machine: Machine, at: Instruction) -> int:
    value, width = (machine.read(name) for name in _operands(at))
    value &= (1 << width) - 1
    if "U32" not in at.modifiers and value >> (width - 1):
        value -= 1 << width
    return value & WORD


def _select(machine: Machine, at: Instruction) -> int:
    chosen = machine.predicate(at.source_operands[2])
    return machine.read(at.source_operands[0 if chosen else 1], _bits(at))


def _set_predicate(machine: Machine, at: Instruction) -> int:
    bits = _bits(at)
    a, b = (machine.read(name, bits) for name in _operands(at)[:2])
    if not {"U32", "U64"} & set(at.modifiers):
        a, b = _signed(a, bits), _signed(b, bits)
    kind = next(name for name in at.modifiers if name in _COMPARE)
    predicates = [name for name in at.source_operands if name not in _operands(at)]
    result = int(_COMPARE[kind](a, b))
    if "EX" in at.modifiers:  # of the high halves, with the comparison of the low halves at hand
        low = machine.predicate(predicates[-1])
        equal = kind in ("EQ", "NE")
        result = (
            (low | (a != b) if kind == "NE" else low & (a == b))
            if equal
            else (low if a == b else int(_COMPARE[kind](a, b)))
        )
    combined = machine.predicate(predicates[0])
    return {"AND": result & combined, "OR": result | combined, "XOR": result ^ combined}[
        next(name for name in at.modifiers if name in ("AND", "OR", "XOR"))
    ]


def _combine_predicates(machine: Machine, at: Instruction) -> int:
    """Returns the first result of a table of three predicates."""
    a, b, c = (machine.predicate(name) for name in at.operands[2:5])
    return int(at.operands[5], 16) >> (4 * a + 2 * b + c) & 1


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


_FUNCTIONS: dict[str, Callable[[Machine, Instruction], int]] = {
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("MOV", "R2UR", "MOV32I"), _move),
    **dict.fromkeys(("IADD3", "IADD", "VIADD", "IADD32I"), _add),
    **dict.fromkeys(("IMAD",), _multiply_add),
    **dict.fromkeys(("SHF",), _shift),
    **dict.fromkeys(("LEA",), _scaled_add),
    **dict.fromkeys(("LOP3",), _logic),
    **dict.fromkeys(("SGXT",), _low_bits),
    **dict.fromkeys(("SEL",), _select),
    **dict.fromkeys(("ISETP",), _set_predicate),
    **dict.fromkeys(("HFMA2",), _move_halves),
    **dict.fromkeys(("PLOP3",), _combine_predicates),
    **dict.fromkeys(("P2R",), _predicates),
    **dict.fromkeys(("R2P",), lambda machine, at: machine.read(at.source_operands[-2])),
    **dict.fromkeys(("VOTE", "VOTEU"), _vote),
    **dict.fromkeys(("POPC",), _count_bits),
    **dict.fromkeys(("FLO",), _highest_bit),
}
