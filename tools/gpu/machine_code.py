"""Parses the machine code of a GPU kernel, and counts the instructions of a time step."""

import re
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import networkx
import triton


class Instruction(NamedTuple):
    """One instruction, such as `@P0 LDG.E.64 R28, desc[UR8][R2.64+0x10]`."""

    offset: int
    guard: str
    """The predicate, such as `P0` or `!P0`; empty if the instruction always runs."""
    name: str
    """The opcode with its modifiers."""
    operands: str
    calls: tuple[tuple[str, int], ...]
    """The calls in the source that led to the instruction, innermost first: files and lines."""

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> str:
        """The label in the operands, or ""."""
        found = re.search(r"`\((.*?)\)", self.operands)
        return found[1] if found else ""

    def __str__(self) -> str:
        return f"{self.offset:#06x} {self.name} {self.operands}"


class Counts(NamedTuple):
    """The instructions of one warp in the code of a time step.

    An instruction in a loop within the step is counted once. Code that only some steps execute is
    included.
    """

    instructions: int
    in_loops: int
    """Instructions in inner loops: over hidden units, over tiles, or waiting for other programs."""
    shuffles: int
    """Exchanges between the lanes of a warp."""
    barriers: int
    """Barriers of the program."""
    global_accesses: int
    """Loads, stores, copies and atomic operations in global memory."""
    tensor: int
    """Products on tensor cores."""


LOADS = {"LDG", "LD", "LDGSTS"}
_GLOBAL = LOADS | {"STG", "ST", "RED", "REDG", "ATOM", "ATOMG"}

_LABEL = re.compile(r"(\.L_\w+|\.text\.\w+):")
# Matches the source line of an instruction, and the lines that call its function.
_SOURCE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
# A line such as `/*1e70*/ @!P2 LDG.E.64.STRONG.GPU R28, desc[UR8][R2.64+0x10] ;`
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([\w.]+)\s*([^;]*?)\s*;")


class Code:
    """The instructions of a kernel, and its loops.

    Excludes code for diverged warps (`BRA.DIV`), which repeats the code for whole warps, and
    functions that the compiler appends to the kernel.
    """

    def __init__(self, text: str):
        """Parses the output of `nvdisasm -c -ndf -gi`."""
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        lines: list[tuple[str, int]] = []
        are_complete = True
        for line in text.splitlines():
            if line.startswith("$"):
                break
            if label := _LABEL.match(line):
                self._labels[label[1]] = len(self.instructions)
            elif found := _SOURCE.match(line):
                lines = [*([] if are_complete else lines), (Path(found[1]).name, int(found[2]))]
                are_complete = False
            elif found := _INSTRUCTION.match(line):
                offset, guard, name, operands = found.groups(default="")
                are_complete = True
                if guard not in ("!PT", "!UPT"):  # a placeholder that never runs
                    instruction = Instruction(
                        int(offset, 16), guard, name, operands, tuple(lines[1:])
                    )
                    self.instructions.append(instruction)
        if not self.instructions:
            raise ValueError("the output of nvdisasm contains no instruction")

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The instruction indices of the longest loop, then of each loop within it."""
        graph = networkx.DiGraph(self._edges())
        longest = max(_loops(graph), key=len, default=None)
        if longest is None:
            return []
        entry = next(
            place for place in longest if not longest.issuperset(graph.predecessors(place))
        )
        return [longest, *_loops(graph.subgraph(longest - {entry}))]

    def _edges(self) -> dict[int, list[int]]:
        """Returns the indices of the possible successors of each reachable instruction."""
        found: dict[int, list[int]] = {}
        # Each entry is (instruction to visit, reconvergence point of each barrier register).
        waiting: list[tuple[int, dict[str, int]]] = [(0, {})]
        while waiting:
            place, meeting = waiting.pop()
            if place in found:
                continue
            instruction = self.instructions[place]
            if instruction.opcode == "BSSY":
                meeting = {
                    **meeting,
                    instruction.operands.split(",")[0]: self._labels[instruction.target],
                }
            found[place] = self._following(place, meeting)
            waiting += [(other, meeting) for other in found[place]]
        return found

    def _following(self, place: int, meeting: dict[str, int]) -> list[int]:
        instruction, below = self.instructions[place], [place + 1]
        is_conditional = instruction.guard or re.search(r"\bU?P\d", instruction.operands)
        if instruction.opcode == "BSYNC" and instruction.operands in meeting:
            return [meeting[instruction.operands]]
        if instruction.opcode in ("BRA", "JMP", "CALL") and instruction.target in self._labels:
            # Follow a call within the kernel like a branch, but step over an appended function.
            if instruction.name.endswith((".DIV", ".CONV")):
                return below
            return [self._labels[instruction.target], *(below if is_conditional else [])]
        # A call to an absolute address reports a failed assertion.
        if instruction.opcode in ("EXIT", "RET", "BPT") or instruction.name.startswith("CALL.ABS"):
            return below if is_conditional else []
        if instruction.opcode in ("BRX", "JMX"):
            raise ValueError(f"branches to computed addresses are not supported: {instruction}")
        return below

    @cached_property
    def step(self) -> list[Instruction]:
        """The instructions of the loop over time."""
        return [self.instructions[place] for place in sorted(self.loops[0])]

    def count(self) -> Counts:
        """Returns the instruction counts of a step."""
        opcodes = [instruction.opcode for instruction in self.step]
        return Counts(
            instructions=len(opcodes),
            in_loops=sum(map(len, self.loops[1:])),
            shuffles=opcodes.count("SHFL"),
            barriers=sum(instruction.name.startswith("BAR.SYNC") for instruction in self.step),
            global_accesses=sum(opcode in _GLOBAL for opcode in opcodes),
            tensor=sum(opcode.endswith("MMA") for opcode in opcodes),
        )


def _loops(graph: networkx.DiGraph) -> list[frozenset[int]]:
    """Returns the outermost loops of a flow graph."""
    components = map(frozenset, networkx.strongly_connected_components(graph))
    return [loop for loop in components if graph.subgraph(loop).size() > 0]


def code_of(cubin: bytes) -> Code:
    """Disassembles a kernel."""
    return Code(run_tool("nvdisasm", "-c", "-ndf", "-gi", cubin=cubin))


def run_tool(name: str, *options: str, cubin: bytes) -> str:
    """Runs one of NVIDIA's tools, which Triton includes, and returns its output for a cubin."""
    tool = Path(triton.backends.__file__).parent / "nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, *options, file.name], check=True, capture_output=True, text=True
        )
    return done.stdout
