"""What the accesses of a kernel to shared and global memory take, by the addresses of a warp.

Shared memory has 32 banks of 4 bytes, and in a cycle each of them gives one word, to any number of
lanes. Global memory is read and written in sectors of 32 bytes. The addresses of the lanes of the
first warp of the first program are computed from the code, for dense rows of the sizes in `_SIZES`;
a lane counts whether it is masked or not.
"""

import re
from collections import Counter
from typing import NamedTuple

from benchmarks.gpu.lint.evaluate import evaluate
from benchmarks.gpu.lint.events import LOADS, STORES, Kernel
from benchmarks.gpu.lint.machine import UnknownValueError
from benchmarks.gpu.lint.sass import LANES

_BANKS = 32
_WORD = 4
_ROW = _BANKS * _WORD  # bytes
SECTOR = 32  # bytes
_SHARED = {"LDS", "STS", "LDSM", "STSM", "LDGSTS"}
_GLOBAL = LOADS | STORES
_MATRIX_LANES = 8  # of which each holds the address of 16 bytes of a matrix
# Arguments of the kernels; the addresses of a warp lie the same way for all sizes like these.
_SIZES = {"T": 8, "B": 4096, "N": 8 * 4096, "time_stride": 4096, "batch_stride": 1}


class Access(NamedTuple):
    """What an access to shared memory takes, for one warp."""

    rows: int
    """Rows of banks, which are cycles."""
    least: int
    """Rows of banks that the words would fill that it touches, if no two were of one bank."""


def access_of(addresses: list[int], size: int) -> Access:
    """Returns what lanes take that read or write at these addresses, so many bytes each."""
    words = {(at + by) // _WORD for at in addresses for by in range(0, size, _WORD)}
    rows = max(Counter(word % _BANKS for word in words).values(), default=0)
    return Access(rows, -(-len(words) // _BANKS))


def sectors_of(addresses: list[int], size: int) -> int:
    """Returns the sectors that lanes touch which read or write at these addresses."""
    last = [at + size - 1 for at in addresses]
    return len({at // SECTOR for at in (*addresses, *last)})


class Memory:
    """Answers what an access to memory takes."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._given = _given(kernel)
        self._bases: dict[tuple, list[int]] = {}

    def shared(self, place: int) -> Access:
        """Returns what the instruction at a place takes of shared memory.

        Where addresses are unknown, its bytes are taken to fill rows.
        """
        at = self.kernel[place]
        if at.opcode not in _SHARED or at.never:
            return Access(0, 0)
        matrices = at.width if at.opcode in ("LDSM", "STSM") else 0
        size = at.bytes
        operand = next(name for name in at.operands if name.startswith("["))
        try:
            addresses = self._addresses(place, operand)
        except UnknownValueError:
            rows = max(1, (matrices * _MATRIX_LANES or LANES) * size // _ROW)
            return Access(rows, rows)
        if not matrices:
            return access_of(addresses, size)
        parts = (addresses[_MATRIX_LANES * i :][:_MATRIX_LANES] for i in range(matrices))
        found = [access_of(part, size) for part in parts]
        return Access(sum(part.rows for part in found), sum(part.least for part in found))

    def sectors(self, place: int) -> int:
        """Returns the sectors of global memory that the instruction at a place touches.

        Where addresses are unknown, all lanes are taken to lie side by side.
        """
        at = self.kernel[place]
        if at.opcode not in _GLOBAL or at.never:
            return 0
        size = at.bytes
        operand = next(name for name in at.operands if name.startswith("desc"))
        try:
            addresses = self._addresses(place, operand[operand.index("][") + 1 :])
        except UnknownValueError:
            return LANES * size // SECTOR
        return sectors_of(addresses, size)

    def _addresses(self, place: int, operand: str) -> list[int]:
        """Returns the address of every lane, from an operand as `[R4+UR5+0x10]`."""
        names = re.findall(r"U?R\d+", operand)
        by = re.search(r"(-?)(0x[0-9a-f]+)\]$", operand)
        offset = int(by[1] + by[2], 16) if by else 0
        bases = [self._base(place, name) for name in names] or [[0] * LANES]
        return [sum(base) + offset for base in zip(*bases, strict=True)]

    def _base(self, place: int, name: str) -> list[int]:
        """Returns what a register holds in every lane, in the first turn of the loops around it."""
        kernel = self.kernel
        block = kernel.flow.block_of[place]
        around = [loop for loop in kernel.flow.loops if block in loop.blocks]
        key = (name, *kernel.values.writers(place, name), around[-1].header)
        if key not in self._bases:
            self._bases[key] = [
                evaluate(
                    kernel.values, place, name, thread=lane, loop=around[-1], given=self._given
                )
                for lane in range(LANES)
            ]
        return self._bases[key]


def _given(kernel: Kernel) -> dict[int, int]:
    """Returns the results of instructions that read what is known at run time alone, by place.

    Pointers are 0, and so is the number of the program; without clusters the window of shared
    memory begins at 0. Before the loop over time lanes exchange nothing but numbers of steps.
    """
    bank = bytearray(max((argument.end for argument in kernel.values.arguments), default=0) + 8)
    for name, begin, end in kernel.values.arguments:
        bank[begin:end] = _SIZES.get(name, 0).to_bytes(end - begin, "little")
    found = {}
    for place in kernel.reachable:
        at = kernel[place]
        if at.opcode in ("S2R", "S2UR") and at.source_operands[0].startswith(
            ("SR_CTAID", "SR_CgaCtaId")
        ):
            found[place] = 0
        elif at.opcode in ("REDUX", "SHFL") and not kernel.is_in_time_loop(place):
            found[place] = _SIZES["T"]
        elif at.opcode in ("LDC", "ULDC") and re.fullmatch(
            r"c\[0x0\]\[0x[0-9a-f]+\]", at.source_operands[0]
        ):
            (begin,) = at.constants
            found[place] = int.from_bytes(bank[begin : begin + 4 * at.width], "little")
    return found
