"""What the instructions of a kernel do, as far as the rules of the lint are about it."""

import enum
from functools import cached_property
from typing import Any, NamedTuple

from tools.lint.building import Built
from tools.lint.cases import Case
from tools.lint.evaluate import evaluate
from tools.lint.flow import Flow, Loop
from tools.lint.machine import UnknownValueError
from tools.lint.sass import Instruction, parse
from tools.lint.values import Values, arguments_of

# Arguments of the kernels: the rows by which members of a block hand each other states, the counter
# at which they meet, and the weights of the recurrence.
EXCHANGED = {"forward": "output", "backward": "dz"}
COUNTER = "arrivals"
WEIGHTS = {"weight_hh", "weight_hh_reverse"}
# Arguments that stand for each other: of the two directions.
_SAME = {"weight_hh_reverse": "weight_hh", "bias_reverse": "bias"}

LOADS = {"LDG", "LD", "LDGSTS"}
STORES = {"STG", "ST"}
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG"}


class Event(enum.Enum):
    """What an instruction does in the exchange of states."""

    STORE = "a store of states"
    LOAD = "a load of states"
    BARRIER = "a barrier of the program"
    FENCE = "a fence"
    ARRIVAL = "an arrival"
    POLL = "a look at the counter"
    INVALIDATION = "an invalidation of L1"
    NEXT_STEP = "from the end of a step to the begin of the next"


class Finding(NamedTuple):
    """A rule that a kernel breaks."""

    rule: str
    message: str


class Kernel:
    """The machine code of a case, with what the rules ask about it."""

    def __init__(self, case: Case, built: Built):
        self.case, self.taken, self.ttir = case, built.taken, built.ttir
        self.flow = Flow(parse(built.sass))
        arguments = arguments_of(case.build.device.arch, built.signature)
        self.values = Values(self.flow, arguments)
        self.pointers = {name for name, size in built.signature if size == 8}
        self.exchanged = EXCHANGED[case.kernel]

    def __getitem__(self, place: int) -> Instruction:
        return self.flow.instructions[place]

    @cached_property
    def reachable(self) -> list[int]:
        """The places that can be reached."""
        return list(self.flow.places(self.flow.after))

    def memory_of(self, place: int) -> set[str]:
        """Returns the arguments that the access to global memory at a place may go to.

        Indices may come from shared memory, so what does is taken for one beside a pointer.
        """
        found = self.values.origins_of_address(place) & self.pointers
        return {_SAME.get(name, name) for name in found} or {"unknown"}

    @cached_property
    def events(self) -> dict[int, Event]:
        """The instructions that belong to the exchange, by place."""
        found = {}
        for place in self.reachable:
            event = self._event(place)
            if event and not self[place].never:
                found[place] = event
        return found

    def _event(self, place: int) -> Event | None:
        at = self[place]
        if at.opcode == "BAR" and "SYNC" in at.modifiers and at.operands == ("0x0",):
            return Event.BARRIER
        if at.opcode == "MEMBAR" and {"GPU", "SYS"} & set(at.modifiers):
            return Event.FENCE
        if at.opcode == "CCTL" and "IVALL" in at.modifiers:
            return Event.INVALIDATION
        if at.opcode not in LOADS | STORES | ATOMICS:
            return None
        memory = self.memory_of(place)
        if COUNTER in memory:
            return Event.ARRIVAL if self.added(place) else Event.POLL
        if memory & {self.exchanged, "unknown"}:
            if at.opcode not in STORES:
                return Event.LOAD
            # Behind the loop over time, rows past the end of sequences are filled with zeros.
            return Event.STORE if self.is_in_time_loop(place) else None
        return None

    def is_in_time_loop(self, place: int) -> bool:
        """Returns whether an instruction is executed in every step."""
        loop = self.time_loop
        return loop is not None and self.flow.block_of[place] in loop.blocks

    def added(self, place: int) -> int:
        """Returns what an access adds to the counter, -1 if that is unknown."""
        at = self[place]
        if at.opcode not in ATOMICS or "ADD" not in at.modifiers:
            return 0
        operand = at.operands[-1]
        if operand.endswith("RZ"):
            return 0
        try:
            return evaluate(self.values, place, operand, thread=0)
        except UnknownValueError:
            return -1

    @cached_property
    def time_loop(self) -> Loop | None:
        """The loop over time: the outermost loop with the most instructions."""
        sizes = {loop: len(list(self.flow.places(loop.blocks))) for loop in self.flow.outermost}
        return max(sizes, key=lambda loop: sizes[loop]) if sizes else None

    def holds(self, place: int, predicate: str, **known: Any) -> bool | None:
        """Returns whether a predicate holds at a place; None if that is unknown.

        Args:
            place: Where the predicate is read.
            predicate: As `P0` or `!P0`.
            known: What `evaluate` may be given: the thread, the loop and its iteration, results.
        """
        if predicate.endswith("T"):
            return not predicate.startswith("!")
        try:
            value = evaluate(self.values, place, predicate.lstrip("!"), **known)
        except UnknownValueError:
            return None
        return bool(value) != predicate.startswith("!")

    def guards(self, place: int) -> list[tuple[int, str]]:
        """Returns the predicates, each with its place, under which an instruction is executed.

        Those are its own guard and the conditions of the branches that lead to its block alone, but
        for those that leave a loop: that happens in the end.
        """
        found = [(place, self[place].guard)] if self[place].guard else []
        block = self.flow.block_of[place]
        for above in self.flow.dominators[block] - {block}:
            if any(above in loop.blocks and block not in loop.blocks for loop in self.flow.loops):
                continue
            last = self.flow.blocks[above][-1]
            following = self.flow.after[above]
            leading = [after for after in following if self._leads(above, after, block)]
            if len(following) == 2 and len(leading) == 1 and (guard := self[last].condition):
                taken = leading[0] != self.flow.block_of.get(last + 1)
                opposite = guard[1:] if guard.startswith("!") else f"!{guard}"
                found.append((last, guard if taken else opposite))
        return found

    def _leads(self, above: int, after: int, block: int) -> bool:
        """Returns whether a block is reached through this edge alone."""
        return after in self.flow.dominators[block] and self.flow.before[after] == [above]
