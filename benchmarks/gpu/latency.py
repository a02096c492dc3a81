"""How long a step of a kernel takes at least: one warp that issues in order, simulated.

A warp issues one instruction a cycle, in the order of the code, as soon as what the instruction
reads is there. Results come after the latency of the unit. Barriers, fences and atomics hold the
warp up; copies to shared memory and products of warp groups run on until the code waits for them.
Nothing else is simulated: other warps, conflicts and full queues are left out.
"""

from collections.abc import Mapping

from benchmarks.gpu.h100 import LATENCIES, tensor_cycles, unit_of
from benchmarks.gpu.lint.events import Kernel
from benchmarks.gpu.lint.flow import Flow, Loop
from benchmarks.gpu.lint.sass import Instruction

Path = list["int | tuple[int, Path]"]
"""Places of instructions in the order of execution; a pair is a number of turns of a loop."""

_STEPS = 3  # that are simulated, of which the last counts
_TURNS = 8  # of an inner loop that are simulated; further ones take as long as the last


def path_of(flow: Flow, loop: Loop, turns: Mapping[Loop, int]) -> Path:
    """Returns the path through one iteration of a loop.

    Where the code branches, both ways are on it, one behind the other.

    Args:
        flow: The control flow.
        loop: The loop.
        turns: How often each inner loop runs.
    """
    inner = flow.inner(loop)
    direct = [one for one in inner if not any(one.blocks < other.blocks for other in inner)]
    loop_of = {block: one for one in direct for block in one.blocks}
    # A node is a block, or the header of an inner loop in the place of all of its blocks.
    node_of = {b: loop_of[b].header if b in loop_of else b for b in loop.blocks}
    waits: dict[int, set[int]] = {node: set() for node in node_of.values()}
    for block in loop.blocks:
        for after in flow.after[block]:
            if after in loop.blocks and after != loop.header and node_of[after] != node_of[block]:
                waits[node_of[after]].add(node_of[block])
    path: Path = []
    while waits:
        node = min(node for node, before in waits.items() if not before & waits.keys())
        del waits[node]
        if node in loop_of:
            one = loop_of[node]
            path.append((turns[one], path_of(flow, one, turns)))
        else:
            path += flow.blocks[node]
    return path


class Warp:
    """A warp that issues in order."""

    def __init__(self) -> None:
        self.clock = 0.0
        """The cycle in which it may issue its next instruction."""
        self._ready: dict[str, float] = {}  # when a register holds its value
        self._tensor_free = 0.0
        # When groups of copies and of products are done, and those that form a group.
        self._copies: list[float] = []
        self._products: list[float] = []
        self._copying, self._multiplying = 0.0, 0.0

    def execute(self, at: Instruction) -> None:
        """Issues an instruction."""
        if at.never:
            return
        names = [*at.sources, *at.source_predicates]
        start = max([self.clock, *(self._ready.get(name, 0.0) for name in names)])
        self.clock = start + 1
        unit = unit_of(at)
        done = start + LATENCIES[unit].value
        if unit == "tensor":
            begin = max(start, self._tensor_free)
            self._tensor_free = begin + tensor_cycles(at)
            done = begin + max(LATENCIES[unit].value, tensor_cycles(at))
        if unit in ("barrier", "fence", "atomic"):
            self.clock = done
        if at.opcode == "HGMMA":  # the code waits for its sums, which others of it do not
            self._multiplying = max(self._multiplying, done)
            if any(operand.startswith("gsb") for operand in at.operands):
                self._products.append(self._multiplying)
        elif at.opcode == "LDGSTS":
            self._copying = max(self._copying, done)
        elif at.opcode == "LDGDEPBAR":
            self._copies.append(self._copying)
        elif at.opcode == "DEPBAR":
            self._wait(self._copies, at)
        elif at.name.startswith("WARPGROUP.DEPBAR"):
            self._wait(self._products, at)
        else:
            self._ready |= dict.fromkeys(at.results, done)

    def _wait(self, groups: list[float], at: Instruction) -> None:
        """Waits until no more than so many groups are on their way."""
        pending = int(at.operands[1], 16)
        waited = groups[: max(0, len(groups) - pending)]
        self.clock = max([self.clock, *waited])
        del groups[: len(waited)]

    def follow(self, path: Path, code: list[Instruction]) -> None:
        """Executes all instructions on a path."""
        for item in path:
            if isinstance(item, int):
                self.execute(code[item])
                continue
            turns, inner = item
            before = self.clock
            for _ in range(min(turns, _TURNS)):
                before = self.clock
                self.follow(inner, code)
            if turns > _TURNS:
                self._skip(before, (turns - _TURNS) * (self.clock - before))

    def _skip(self, since: float, by: float) -> None:
        """Lets time pass, for all that is on its way since a time."""
        self.clock += by
        self._tensor_free += by
        self._copying += by
        self._multiplying += by
        self._copies = [done + by for done in self._copies]
        self._products = [done + by for done in self._products]
        for name, done in self._ready.items():
            if done > since:
                self._ready[name] = done + by


def cycles_of_an_iteration(code: list[Instruction], path: Path) -> float:
    """Returns the cycles from one iteration to the next, when a loop has run for some time."""
    warp = Warp()
    ends = []
    for _ in range(_STEPS):
        warp.follow(path, code)
        ends.append(warp.clock)
    return ends[-1] - ends[-2]


def latency_of_a_step(kernel: Kernel, turns: Mapping[Loop, int]) -> float:
    """Returns the cycles of a step of the loop over time.

    Args:
        kernel: The kernel.
        turns: How often each loop within the loop over time runs.
    """
    if kernel.time_loop is None:
        raise ValueError("there is no loop over time")
    path = path_of(kernel.flow, kernel.time_loop, turns)
    return cycles_of_an_iteration(kernel.flow.instructions, path)
