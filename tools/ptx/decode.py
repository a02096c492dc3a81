"""Decodes the PTX of one kernel into instructions for the machine.

Most instructions keep their PTX name, and their operands are results followed by sources.
Instructions with another syntax have a method of `Decoder`. Anything unknown raises an
`UnsupportedError`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class UnsupportedError(Exception):
    """The PTX contains something that this module or the machine does not support."""


class Operand(NamedTuple):
    """A register or a constant."""

    number: int
    """The operand's index among the registers and constants of the kernel."""
    size: int
    """Bytes per lane; 1 for a predicate, 0 for an unused operand."""


class Signature(NamedTuple):
    """The operand sizes of an instruction; both lists are empty if the sizes vary."""

    results: list[int]
    sources: list[int]


@dataclass
class Instruction:
    """An instruction for the machine."""

    name: str
    line: int
    guard: Operand | None
    is_guard_negated: bool
    results: list[Operand] = field(default_factory=list)
    sources: list[Operand] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


_NOTHING = Operand(0, 0)
_MOST_INSTRUCTIONS = 2**16  # the machine stores their indices in 16 bits
_SPECIAL = ["%tid.x", "%laneid", "%ntid.x"]
_SPECIAL += [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]
"""The special registers, in the order in which machine.cpp fills them."""
_SPACES = {"param", "global", "shared", "shared::cta"}
_HINTS = re.compile(r"weak|ca|cg|nc|gpu|v[248]|L[12]::.*|evict_\w+")
"""Parts of the names of loads and stores that do not change their meaning. `.cg` is among them: it
asks to bypass L1, but PTX's memory model does not guarantee that."""


def size_of(type: str) -> int:
    """Returns the size in bytes of a PTX type, or 1 for `pred`."""
    if type == "pred":
        return 1
    found = re.fullmatch(r"[busf](8|16|32|64)", type)
    if found is None:
        raise UnsupportedError(f"the type {type} is not supported")
    return int(found[1]) // 8


class Decoder:
    """A decoded kernel.

    Args:
        text: The PTX of one kernel.
        signature: Returns the operand sizes of an instruction, or None if it is unknown.
    """

    def __init__(self, text: str, signature: Callable[[str], Signature | None]):
        self._signature = signature
        self.instructions: list[Instruction] = []
        self.sources: dict[int, str] = {}
        """The Python file and line that each PTX line comes from."""
        self.parameters: list[tuple[int, int]] = []
        """Offset and size of each parameter, in bytes."""
        self.messages = _messages(text)
        """The messages of the kernel's assertions."""
        self.sizes: list[int] = []
        """The size of each operand, by its number."""
        self.constants: dict[tuple[int, int], Operand] = {}
        """The constants, by value and size."""
        self._scopes: list[dict[str, Operand]] = [{}]
        self._labels: dict[str, int] = {}
        self._targets: list[tuple[Instruction, str]] = []
        # Shared memory starts at 0. The addresses of assertion messages are never used.
        symbols = r"\.extern \.shared [^;]*?(\w+)\[\]|\.global [^;=]*?(\w+)\[\d+\] ="
        self._symbols = {shared or message: 0 for shared, message in re.findall(symbols, text)}
        self._line = 0

        self.specials = [self._declare(name, 4) for name in _SPECIAL]
        begin = self._head(text)
        for line, statement in _statements(text, begin, self.sources):
            self._line = line
            self._decode(statement)
        if len(self.instructions) > _MOST_INSTRUCTIONS:
            raise UnsupportedError(f"{len(self.instructions)} instructions are too many")
        for instruction, label in self._targets:
            instruction.numbers.append(self._labels[label])

    def _head(self, text: str) -> int:
        """Reads the parameters and the number of threads; returns the offset of the body."""
        head = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{", text, re.DOTALL)
        if head is None:
            raise UnsupportedError("the PTX contains no kernel")
        self.name = head[1]
        end = 0
        for line in head[2].split(",\n"):
            found = re.search(r"\.param \.(\w+).*?(\w+)\s*$", line)
            if found is None:
                raise UnsupportedError(f"the parameter {line} is not supported")
            size = size_of(found[1])
            begin = -(-end // size) * size
            end = begin + size
            self._symbols[found[2]] = begin
            self.parameters.append((begin, size))
        threads = re.search(r"\.reqntid (\d+)", head[3])
        self.threads = int(threads[1]) if threads else 0
        return head.end()

    def _new(self, size: int) -> Operand:
        self.sizes.append(size)
        return Operand(len(self.sizes) - 1, size)

    def _declare(self, name: str, size: int) -> Operand:
        self._scopes[-1][name] = self._new(size)
        return self._scopes[-1][name]

    def _register(self, name: str) -> Operand | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _constant(self, value: int, size: int) -> Operand:
        value &= 2 ** (32 if size == 1 else 8 * size) - 1
        if (value, size) not in self.constants:
            self.constants[value, size] = self._new(size)
        return self.constants[value, size]

    def _number(self, text: str) -> int:
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return int(found[1], 16)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        if text in self._symbols:
            return self._symbols[text]
        raise UnsupportedError(f"{text} in line {self._line} is not supported")

    def _operand(self, text: str, size: int | None) -> Operand:
        """Returns a register, or a constant of the given size."""
        if text == "_":
            return self._new(size) if size else _NOTHING
        found = self._register(text)
        if found is None:
            if size is None:
                raise UnsupportedError(f"{text} in line {self._line} is not supported")
            value = self._number(text)
            found = self._constant(-bool(value) if size == 1 else value, size)
        elif size is not None and found.size != size:
            raise UnsupportedError(
                f"{text} must have {size} bytes, got {found.size} in line {self._line}"
            )
        return found

    def _address(self, text: str) -> tuple[Operand, int]:
        """Returns the register and the offset of `[ register + offset ]`."""
        found = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if found is None:
            raise UnsupportedError(f"{text} in line {self._line} is not supported")
        base = self._register(found[1]) or self._constant(self._number(found[1]), 8)
        return base, int(found[2] or "0", 0)

    def _decode(self, statement: str) -> None:
        if statement == "{":
            self._scopes.append({})
        elif statement == "}":
            self._scopes.pop()
        elif statement.endswith(":"):
            self._labels[statement[:-1]] = len(self.instructions)
        elif statement.startswith(".reg "):
            self._registers(statement)
        elif not statement.startswith((".param ", ".pragma ")):
            self._instruction(statement)

    def _registers(self, statement: str) -> None:
        _, type, names = statement.split(maxsplit=2)
        for name in map(str.strip, names.split(",")):
            several = re.fullmatch(r"(%\w+)<(\d+)>", name)
            if several:
                for i in range(int(several[2])):
                    self._declare(f"{several[1]}{i}", size_of(type[1:]))
            else:
                self._declare(name, size_of(type[1:]))

    def _instruction(self, statement: str) -> None:
        guard = re.match(r"@(!?)(%?\w+)\s+", statement)
        name, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
        made = Instruction(
            name,
            self._line,
            self._operand(guard[2], 1) if guard else None,
            bool(guard and guard[1]),
        )
        arguments = [_flat(argument) for argument in _split(rest)]
        parts = name.split(".")
        special = getattr(self, f"_{parts[0]}", None)
        if special is None or special(made, parts, arguments) is False:
            self._plain(made, [text for argument in arguments for text in argument])
        if made.name:
            self.instructions.append(made)

    def _plain(self, made: Instruction, arguments: list[str]) -> None:
        signature = self._signature(made.name)
        if signature is None:
            raise UnsupportedError(f"{made.name} in line {self._line} is not supported")
        sizes = [*signature.results, *signature.sources]
        if len(sizes) != len(arguments):
            raise UnsupportedError(f"line {self._line}: {made.name} has {len(arguments)} operands")
        operands = [self._operand(text, size) for text, size in zip(arguments, sizes, strict=True)]
        made.results = operands[: len(signature.results)]
        made.sources = operands[len(signature.results) :]

    # Methods for instructions with special syntax, named after the first part of the instruction. A
    # method returns False to fall back to `_plain`, and clears the name to drop the instruction.

    def _mov(self, made, parts, arguments):
        if len(arguments[0]) == len(arguments[1]) == 1:
            return False
        whole = size_of(parts[-1])
        made.name = "pack"
        for operands, texts in zip((made.results, made.sources), arguments, strict=True):
            operands += [self._operand(text, whole // len(texts)) for text in texts]
        return True

    def _ld(self, made, parts, arguments):
        address, offset = self._address(arguments[1][0])
        size = self._memory(made, parts)
        made.results = [self._operand(text, None) for text in arguments[0]]
        made.sources = [address]
        made.numbers = [offset, size, int(parts[-1].startswith("s"))]

    def _st(self, made, parts, arguments):
        if "param" in parts:  # an argument of __assertfail
            made.name = ""
            return
        address, offset = self._address(arguments[0][0])
        size = self._memory(made, parts)
        values = [
            self._register(text) or self._operand(text, max(size, 2)) for text in arguments[1]
        ]
        made.sources = [address, *values]
        made.numbers = [offset, size]

    def _red(self, made, parts, arguments):
        address, offset = self._address(arguments[0][0])
        size = self._memory(made, parts)
        if parts[-1] != "u32":
            raise UnsupportedError(f"{'.'.join(parts)} in line {self._line} is not supported")
        made.sources = [address, self._operand(arguments[1][0], size)]
        made.numbers = [offset, size]

    def _memory(self, made, parts) -> int:
        """Drops hints from the name of a memory access; returns the size of a value in bytes."""
        kept = [part for part in parts[:-1] if not _HINTS.fullmatch(part)]
        made.name = ".".join(kept).replace("::cta", "")
        if not _SPACES & set(parts) or parts[-1][0] not in "busf":
            raise UnsupportedError(f"{'.'.join(parts)} in line {self._line} is not supported")
        return size_of(parts[-1])

    def _cp(self, made, parts, arguments):
        if parts[2] == "wait_group":
            made.numbers = [int(arguments[0][0])]
        elif parts[2] != "commit_group":
            if not {"shared", "global"} <= set(parts):
                raise UnsupportedError(f"{made.name} in line {self._line} is not supported")
            made.name = "cp.async"
            target, source = (self._address(argument[0]) for argument in arguments[:2])
            copied_bytes = [self._operand(argument[0], 4) for argument in arguments[3:]]
            made.sources = [target[0], source[0], *copied_bytes]
            made.numbers = [target[1], source[1], int(arguments[2][0], 0)]

    def _bar(self, made, parts, arguments):
        if parts[1] == "warp":
            return False
        threads = [int(argument[0]) for argument in arguments[1:]]
        if arguments[0] != ["0"] or threads not in ([], [self.threads]):
            raise UnsupportedError(f"line {self._line}: barriers for some warps are not supported")
        return True

    def _matrices(self, made, parts, address, registers):
        base, offset = self._address(address)
        if parts[1:4] != ["sync", "aligned", "m8n8"]:
            raise UnsupportedError(f"{made.name} in line {self._line} is not supported")
        made.name = parts[0]
        made.numbers = [offset, int("trans" in parts)]
        return base, [self._operand(register, 4) for register in registers]

    def _ldmatrix(self, made, parts, arguments):
        base, made.results = self._matrices(made, parts, arguments[1][0], arguments[0])
        made.sources = [base]

    def _stmatrix(self, made, parts, arguments):
        base, values = self._matrices(made, parts, arguments[0][0], arguments[1])
        made.sources = [base, *values]

    def _wgmma(self, made, parts, arguments):
        if parts[1] == "wait_group":
            made.name, made.numbers = "wgmma.wait_group", [int(arguments[0][0])]
            return True
        if parts[1] != "mma_async":
            return False
        shape = re.fullmatch(r"m64n(\d+)k\d+", parts[4])
        results, left, (right,), (adds,), *signs = arguments
        transposed = [int(flag[0]) for flag in signs[2:]]
        while len(transposed) < 2:  # absent if left is in registers, and in TF32
            transposed.insert(0, 0)
        if shape is None or [sign[0] for sign in signs[:2]] != ["1", "1"] or parts[5] != "f32":
            raise UnsupportedError(f"{made.name} in line {self._line} is not supported")
        made.name = f"wgmma.{parts[6]}"
        made.results = [self._operand(result, 4) for result in results]
        left_size = 8 if len(left) == 1 else 4
        made.sources = [self._operand(right, 8), self._operand(adds, 1)]
        made.sources += [self._operand(text, left_size) for text in left]
        made.numbers = [int(shape[1]), *transposed]
        return True

    def _bra(self, made, parts, arguments):
        made.name = "bra"
        self._targets.append((made, arguments[0][0]))

    def _call(self, made, parts, arguments):
        if arguments[0] != ["__assertfail"]:
            raise UnsupportedError(f"line {self._line}: calls to {arguments[0]} are not supported")
        made.name = "assertion"


def _messages(text: str) -> list[str]:
    found = re.findall(r"\.global [^;=]*?\bassertMessage\w*\[\d+\] = \{([^}]*)\}", text)
    return [bytes(map(int, codes.split(","))).split(b"\0")[0].decode() for codes in found]


def _statements(text: str, begin: int, sources: dict[int, str]) -> Iterator[tuple[int, str]]:
    """Yields (line, statement) for each brace, label and instruction of the body.

    Adds the Python file and line of each PTX line to `sources`.
    """
    line = text.count("\n", 0, begin) + 1
    depth, statement, place, first = 1, "", "", line
    for row in text[begin:].split("\n"):
        code, _, comment = row.partition("//")
        code = code.strip()
        if code.startswith(".loc"):  # may also be inside multi-line inline assembly
            place = comment.split()[0] if comment.split() else place
            code = ""
        elif re.fullmatch(r"[$\w]+:", code):
            yield line, code
            code = ""
        for piece in re.findall(r"[^;]*;|[^;]+$", code):
            while not statement and (brace := re.match(r"\s*([{}])", piece)):
                depth += 1 if brace[1] == "{" else -1
                if depth == 0:
                    return
                yield line, brace[1]
                piece = piece[brace.end() :]
            if not piece.strip():
                continue
            if not statement:
                first = line
            statement += " " + piece.rstrip(";")
            if piece.endswith(";"):
                sources[first] = place
                if statement.strip():
                    yield first, " ".join(statement.split())
                statement = ""
        line += 1


def _split(text: str) -> list[str]:
    """Splits operands at their top-level commas."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text) if part.strip()]


def _flat(argument: str) -> list[str]:
    """Returns the registers of `{a, b}` or of `a|b`, or the argument itself."""
    if argument.startswith(("{", "(")):
        return [register.strip() for register in argument[1:-1].split(",")]
    return argument.split("|")
