"""Machine code of NVIDIA GPUs (SASS) as nvdisasm prints it, parsed into instructions.

An instruction looks like `/*1e70*/ @!P2 LDG.E.64.STRONG.GPU R28, desc[UR8][R2.64+0x10] ;`.
"""

import math
import re
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_\w+|\.text\.\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?(\S[^;]*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"\bU?R(?:\d+|Z)\b")
_PREDICATE = re.compile(r"^!?(U?P(?:\d|T))$")
_OPERAND = re.compile(r"(?:\[[^\]]*\]|`\([^)]*\)|[^,\[])+")  # commas within brackets are no borders
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")

LANES = 32  # of a warp
_BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
_PRODUCTS = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}

# Instructions without a register as a result.
_NO_RESULT = {
    *("ST", "STG", "STS", "STL", "RED", "REDG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "CCTL", "MEMBAR"),
    *("BAR", "BRA", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "NOP", "WARPSYNC", "ERRBAR"),
    *("CGAERRBAR", "YIELD", "NANOSLEEP", "KILL", "BPT", "R2P", "PLOP3", "UPLOP3", "STSM"),
}


def registers(operand: str) -> list[str]:
    """Returns the registers that an operand names, without those that are always zero."""
    return [name for name in _REGISTER.findall(operand) if not name.endswith("Z")]


def next_register(name: str, by: int = 1) -> str:
    """Returns the register so many places after this one."""
    kind, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
    return f"{kind}{number + by}"


class Instruction(NamedTuple):
    """One instruction."""

    offset: int
    guard: str
    """The predicate under which it is executed, as `P0` or `!P0`; empty if always."""
    name: str
    """The opcode with its modifiers, as `LDG.E.64.STRONG.GPU`."""
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    @property
    def never(self) -> bool:
        """Whether it is never executed: a place holder."""
        return self.guard in ("!PT", "!UPT")

    @property
    def target(self) -> str | None:
        """The label that it names."""
        found = _TARGET.search(" ".join(self.operands))
        return found[1] if found else None

    @property
    def condition(self) -> str:
        """The predicate under which a branch is taken, where there is one alone; else empty."""
        first = self.operands[0] if self.operands else ""
        own = first if _PREDICATE.match(first) else ""
        return "" if self.guard and own else self.guard or own

    @property
    def constants(self) -> list[int]:
        """The places in the bank of constants, where the kernel's arguments are, that it reads."""
        return [int(place, 16) for place in _CONSTANT.findall(" ".join(self.operands))]

    @property
    def address(self) -> list[str]:
        """The registers of its address in global memory, the low half alone; empty without one."""
        for operand in self.operands:
            found = re.search(r"\[(U?R\d+\.(?:64|U32)[^\]]*)\]", operand)
            if found:
                return registers(found[1])
        return []

    @property
    def width(self) -> int:
        """The registers of its result, or of the value that it stores."""
        if "128" in self.modifiers:
            return 4
        if self._of_64_bits or "WIDE" in self.modifiers or self.opcode == "CS2R":
            return 1 if "32" in self.modifiers else 2
        if self.opcode in ("HMMA", "IMMA", "QMMA", "OMMA"):
            return 4
        if self.opcode == "LDSM":
            return int(self.modifiers[-1]) if self.modifiers[-1] in ("2", "4") else 1
        return 1

    @property
    def bytes(self) -> int:
        """The bytes that a lane reads or writes in memory; of a matrix, those of a row."""
        if self.opcode in ("LDSM", "STSM"):
            return 16
        return next((_BYTES[name] for name in self.modifiers if name in _BYTES), 4)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of a product on tensor cores: `HMMA.16816`, `HGMMA.64x8x16`.

        Raises:
            ValueError: The sizes are unknown.
        """
        for part in self.modifiers:
            sizes = _PRODUCTS.get(part) or part.split("x")
            if len(sizes) == 3 and all(str(size).isdigit() for size in sizes):
                return math.prod(map(int, sizes))
        raise ValueError(f"the sizes of {self} are unknown")

    @property
    def _of_64_bits(self) -> bool:
        """Whether it computes with pairs of registers."""
        compares = self.opcode.endswith(("MNMX", "SETP")) and {"S64", "U64"} & set(self.modifiers)
        return "64" in self.modifiers or bool(compares)

    @property
    def _split(self) -> tuple[list[str], list[str]]:
        """Its results and its sources, as operands."""
        if self.opcode in _NO_RESULT:
            count = 2 if self.opcode in ("PLOP3", "UPLOP3") else 0
            return list(self.operands[:count]), list(self.operands[count:])
        if self.opcode.endswith("SETP"):
            return list(self.operands[:2]), list(self.operands[2:])
        count = 0
        while count < len(self.operands) and _PREDICATE.match(self.operands[count]):
            count += 1  # a predicate before the result
        count += 1
        most = count + (1 if self.opcode in ("VOTE", "VOTEU") else 2)
        while count < len(self.operands) and re.match(r"^U?P[0-9T]$", self.operands[count]):
            if count == most:
                break
            count += 1  # a carry
        return list(self.operands[:count]), list(self.operands[count:])

    @property
    def moved(self) -> list[str]:
        """The predicates that it moves to or from bits of a register: `P2R R0, PR, RZ, 0x20`."""
        mask = int(self.operands[-1], 16) if self.opcode in ("P2R", "R2P") else 0
        return [f"P{i}" for i in range(7) if mask >> i & 1]

    @property
    def results(self) -> list[str]:
        """Registers and predicates that it writes."""
        if self.opcode == "R2P":
            return self.moved
        found = []
        for operand in self._split[0]:
            if predicate := _PREDICATE.match(operand):
                found.append(predicate[1])
            else:
                for name in registers(operand)[:1]:
                    found += [next_register(name, i) for i in range(self.width)]
        return found

    @property
    def sources(self) -> list[str]:
        """Registers that it reads; both halves where values have 64 bits. No predicates."""
        found = []
        operands = self._split[1]
        for i, operand in enumerate(operands):
            pair = self._of_64_bits or ("WIDE" in self.modifiers and i == 2)
            for name in registers(operand):
                found += [name, next_register(name)] if pair else [name]
        return found

    @property
    def source_operands(self) -> list[str]:
        """Operands that it reads."""
        return self._split[1]

    @property
    def source_predicates(self) -> list[str]:
        """Predicates that it reads, its guard among them, without those that are always set."""
        operands = [*self._split[1], self.guard]
        found = [match[1] for operand in operands if (match := _PREDICATE.match(operand))]
        moved = self.moved if self.opcode == "P2R" else []
        return [name for name in found + moved if not name.endswith("T")]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.offset:#06x} {guard}{self.name} {', '.join(self.operands)}".rstrip()


class Code(NamedTuple):
    """The instructions of one kernel."""

    instructions: list[Instruction]
    labels: dict[str, int]
    """The index of the instruction behind each label."""


def parse(text: str) -> Code:
    """Returns the kernel in what nvdisasm printed; functions that the compiler adds are left out.

    Such functions, as `$__internal_0_…`, stand behind the kernel, in the same section.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("$"):
            break
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            name, _, operands = found[3].partition(" ")
            parts = tuple(
                part.strip().replace(".reuse", "")
                for part in _OPERAND.findall(operands)
                if part.strip()
            )
            instructions.append(Instruction(int(found[1], 16), found[2] or "", name, parts))
    if not instructions:
        raise ValueError("there is no instruction in what nvdisasm printed")
    return Code(instructions, labels)
