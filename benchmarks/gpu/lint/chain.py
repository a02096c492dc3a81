"""How long a step takes one warp at least: a simulation of its instructions, one after the other.

An instruction is issued a cycle after the one before it, and not before its sources are there. All
warps are taken to reach a barrier at the same time, and all programs to arrive at the same time.
"""

from benchmarks.gpu.lint.events import ATOMICS, LOADS, STORES, Event, Kernel
from benchmarks.gpu.lint.flow import Loop

# Cycles until a result is there, one number for each unit; `benchmarks/gpu/model.py` has sources.
ARITHMETIC, SHARED, L2 = 4, 20, 200
SHUFFLE, SPECIAL, TENSOR, BARRIER = 20, 20, 33, 20
_UNITS = {
    **dict.fromkeys(("LDS", "LDSM", "LDC", "S2R"), SHARED),
    **dict.fromkeys(("SHFL", "REDUX", "CREDUX", "VOTE"), SHUFFLE),
    "MUFU": SPECIAL,
    **dict.fromkeys(("HMMA", "HGMMA", "WARPGROUP"), TENSOR),
}
_TURNS = 4  # of a loop that are simulated; the last one stands for all others


class _Warp:
    """A warp that executes a kernel."""

    def __init__(self, kernel: Kernel, turns: dict[Loop, int]):
        self.kernel, self.turns = kernel, turns
        self.now = 0.0
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []  # when groups of copies into shared memory are done
        self.copying = self.stored = self.arrived = 0.0

    def run(self, loop: Loop) -> None:
        """Executes one iteration of a loop."""
        flow = self.kernel.flow
        inner = [other for other in flow.inner(loop) if self._is_child(other, loop)]
        done: set[Loop] = set()
        for place in flow.places(loop.blocks):
            block = flow.block_of[place]
            around = next((other for other in inner if block in other.blocks), None)
            if around is None:
                self.issue(place)
            elif around not in done:
                done.add(around)
                self.repeat(around)

    def _is_child(self, inner: Loop, loop: Loop) -> bool:
        return not any(inner.blocks < o.blocks < loop.blocks for o in self.kernel.flow.loops)

    def repeat(self, loop: Loop) -> None:
        """Executes all iterations of an inner loop."""
        turns, began = self.turns[loop], self.now
        for _ in range(min(turns, _TURNS)):
            began = self.now
            self.run(loop)
        left = (self.now - began) * max(0, turns - _TURNS)
        self.now += left
        self.ready = {name: time + left for name, time in self.ready.items()}
        self.copies = [time + left for time in self.copies]

    def issue(self, place: int) -> None:
        """Executes one instruction."""
        at, event = self.kernel[place], self.kernel.events.get(place)
        if at.never:
            return
        needed = [*at.sources, *at.source_predicates]
        self.now = max([self.now + 1, *(self.ready.get(name, 0.0) for name in needed)])
        latency = _UNITS.get(at.opcode, ARITHMETIC)
        if event is Event.POLL:
            self.now = max(self.now, self.arrived)
        if at.opcode == "LDGSTS":
            self.copying = max(self.copying, self.now + L2)
        elif at.opcode == "LDGDEPBAR":
            self.copies.append(self.copying)
        elif at.opcode == "DEPBAR" and len(at.operands) > 1:
            behind = int(at.operands[1], 16) + 1
            self.now = max([self.now, *self.copies[-behind : len(self.copies) - behind + 1]])
        elif at.opcode in STORES:
            self.stored = self.now + L2
        elif event is Event.FENCE:
            self.now = max(self.now, self.stored)
        elif event is Event.ARRIVAL:
            self.arrived = self.now + L2
        elif event is Event.BARRIER:
            self.now += BARRIER
        elif at.opcode in LOADS | ATOMICS:
            latency = L2
        for name in at.results:
            self.ready[name] = self.now + latency


def chain(kernel: Kernel, turns: dict[Loop, int]) -> int:
    """Returns the cycles of a step.

    Args:
        kernel: The kernel.
        turns: How often each loop within the loop over time runs.
    """
    warp = _Warp(kernel, turns)
    began = 0.0
    for _ in range(_TURNS):
        began = warp.now
        warp.run(kernel.time_loop)
    return round(warp.now - began)
