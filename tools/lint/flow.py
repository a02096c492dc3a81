"""The control flow of a kernel: basic blocks, dominators and loops."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from tools.lint.sass import Code, Instruction


class Loop(NamedTuple):
    """A natural loop."""

    header: int
    """The block at which an iteration begins."""
    blocks: frozenset[int]
    """All of its blocks, those of inner loops among them."""


class Flow:
    """The control-flow graph of a kernel.

    Left out are branches to code for a warp whose lanes have parted (`BRA.DIV`), which computes
    what the code beside it computes for a warp whose lanes are together.
    """

    def __init__(self, code: Code):
        self.code = code
        self.instructions = code.instructions
        edges = self._edges()
        begins = {0}
        for place, after in edges.items():
            if after != [place + 1]:
                begins.update([place + 1, *after])
        begins.update(place for place in code.labels.values())
        starts = sorted(place for place in begins if place < len(self.instructions))
        self.blocks = [
            range(start, end)
            for start, end in zip(starts, [*starts[1:], len(self.instructions)], strict=True)
        ]
        """The places of the instructions of each basic block."""
        block_at = {block.start: i for i, block in enumerate(self.blocks)}
        every = {
            i: [block_at[place] for place in edges.get(block[-1], [])]
            for i, block in enumerate(self.blocks)
        }
        reached = set(_depth_first(0, every))
        self.after = {block: every[block] for block in sorted(reached)}
        """The blocks that may follow each block that can be reached."""
        self.before: dict[int, list[int]] = {block: [] for block in self.after}
        for block, following in self.after.items():
            for other in following:
                self.before[other].append(block)

    def _edges(self) -> dict[int, list[int]]:
        """Returns the places that may follow the instruction at each place that can be reached."""
        found: dict[int, set[int]] = {}
        # A state is a place and the labels at which warps meet again, by barrier register.
        waiting: list[tuple[int, tuple[tuple[str, int], ...]]] = [(0, ())]
        seen = set(waiting)
        while waiting:
            place, meeting = waiting.pop()
            if place >= len(self.instructions):
                continue
            at = self.instructions[place]
            following, meeting = self._following(place, at, dict(meeting))
            found.setdefault(place, set()).update(following)
            for other in following:
                state = (other, tuple(sorted(meeting.items())))
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
        return {place: sorted(after) for place, after in found.items()}

    def _following(self, place: int, at: Instruction, meeting: dict[str, int]):
        following = [place + 1]
        if at.opcode == "BSSY":
            meeting = {**meeting, at.operands[0]: self.code.labels[at.target or ""]}
        elif at.opcode == "BSYNC" and at.operands[0] in meeting:
            following = [meeting[at.operands[0]]]
            meeting = {name: label for name, label in meeting.items() if name != at.operands[0]}
        elif at.opcode in ("BRA", "JMP", "CALL") and not {"DIV", "ABS"} & set(at.modifiers):
            # Within a kernel CALL is a branch; other functions come back.
            if at.target in self.code.labels and "CONV" not in at.modifiers:
                following = [self.code.labels[at.target]]
                if at.source_predicates:
                    following.append(place + 1)
        elif at.opcode in ("EXIT", "RET", "BRX", "JMX", "BPT") or at.name.startswith("CALL.ABS"):
            # The driver's only function is that of a failed assertion, which does not come back.
            if at.opcode in ("BRX", "JMX"):
                raise ValueError(f"a branch to a computed place is not understood: {at}")
            following = [place + 1] if at.source_predicates else []
        return following, meeting

    def places(self, blocks) -> Iterator[int]:
        """Yields the places of the instructions of some blocks, in the order of the code."""
        for block in sorted(blocks):
            yield from self.blocks[block]

    @cached_property
    def block_of(self) -> dict[int, int]:
        """The block of each place that can be reached."""
        return {place: block for block in self.after for place in self.blocks[block]}

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """The blocks that lie on every way to a block, itself among them."""
        order = _depth_first(0, self.after)[::-1]
        found = {block: set(self.after) for block in self.after}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order:
                if block == 0:
                    continue
                new = set.intersection(*(found[other] for other in self.before[block])) | {block}
                if new != found[block]:
                    found[block], changed = new, True
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, one for each header, outer loops before their inner loops."""
        found: dict[int, set[int]] = {}
        for block, following in self.after.items():
            for header in following:
                if header in self.dominators[block]:
                    body = found.setdefault(header, {header})
                    waiting = [block]
                    while waiting:
                        inside = waiting.pop()
                        if inside not in body:
                            body.add(inside)
                            waiting += self.before[inside]
        loops = [Loop(header, frozenset(body)) for header, body in found.items()]
        return sorted(loops, key=lambda loop: -len(loop.blocks))

    def inner(self, loop: Loop) -> list[Loop]:
        """Returns the loops within a loop, at any depth."""
        return [other for other in self.loops if other.blocks < loop.blocks]

    @cached_property
    def outermost(self) -> list[Loop]:
        """The loops that are within no other loop."""
        return [loop for loop in self.loops if not any(loop.blocks < o.blocks for o in self.loops)]


def _depth_first(start: int, after: dict[int, list[int]]) -> list[int]:
    """Returns the blocks that can be reached, each behind all that follow it."""
    found: list[int] = []
    seen = {start}
    stack = [(start, iter(after[start]))]
    while stack:
        block, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(after[other])))
                break
        else:
            found.append(block)
            stack.pop()
    return found
