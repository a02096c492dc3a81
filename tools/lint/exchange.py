"""The rules of the exchange of states between the programs that share out the hidden units.

PTX's memory model asks for these, in this order, between a store of states by any thread of one
program and the load of those states by any thread of another:

1. the store, then a barrier of its program;
2. by one thread: a fence for the whole GPU, then an atomic operation on the counter (a release);
3. by one thread of the other program: a strong read of the counter that sees that operation, then
   an invalidation of L1 (an acquire);
4. a barrier of the other program, then the load.

A program that is its block's only member needs a barrier between store and load, no more.
"""

from collections.abc import Callable, Iterator

from tools.lint.events import COUNTER, Event, Finding, Kernel
from tools.lint.flow import Loop

_STEPS = 4  # for which the awaited count is computed


def check(kernel: Kernel) -> Iterator[Finding]:
    """Yields what is wrong with the exchange."""
    plan = kernel.case.build.plan
    if plan.kind == "resident":  # states stay within a thread, or pass through shared memory
        return
    events = set(kernel.events.values())
    if Event.STORE not in events:
        yield Finding("exchange", f"no store into {kernel.exchanged} was found")
    if plan.members == 1:
        yield from _follow(kernel, 0, _within_a_program)
        return
    if Event.LOAD not in events:
        yield Finding("exchange", f"no load from {kernel.exchanged} was found")
    arrivals = [place for place, event in kernel.events.items() if event is Event.ARRIVAL]
    if len(arrivals) != 1:
        yield Finding("arrival", f"{len(arrivals)} places arrive at {COUNTER}, not one")
        return
    elected = _elected(kernel, arrivals[0])
    yield from _check_arrival(kernel, arrivals[0], elected)
    yield from _check_wait(kernel)
    thread = elected[0] if elected else 0
    yield from _follow(kernel, thread, _release)
    yield from _follow(kernel, thread, _acquire)


def _elected(kernel: Kernel, place: int) -> list[int] | None:
    """Returns the threads that arrive, or None if that is unknown."""
    guards = []
    for at, guard in kernel.guards(place):
        origins = kernel.values.origins(at, guard.lstrip("!"))
        if "SR_TID.X" in origins:
            guards.append((at, guard))
        elif "unknown" in origins and kernel.is_in_time_loop(at):
            return None
    found = []
    for thread in range(32 * kernel.case.build.plan.warps):
        held = [kernel.holds(at, guard, thread=thread) for at, guard in guards]
        if None in held:
            return None
        if all(held):
            found.append(thread)
    return found


def _check_arrival(kernel: Kernel, place: int, elected: list[int] | None) -> Iterator[Finding]:
    at, added = kernel[place], kernel.added(place)
    loop, inner = _loops_around(kernel, place)
    if loop is None or inner is not None:
        yield Finding("arrival", f"not once in each step: {at}")
    if elected is None:
        yield Finding("arrival", f"cannot tell which threads arrive: {at}")
    elif len(elected) != 1:
        yield Finding("arrival", f"{len(elected)} threads of a program arrive: {at}")
    if added != 1:
        yield Finding("arrival", f"adds {added}, not 1: {at}")
    if not {"GPU", "SYS"} & set(at.modifiers):
        yield Finding("arrival", f"the other programs need not see it: {at}")


def _loops_around(kernel: Kernel, place: int) -> tuple[Loop | None, Loop | None]:
    """Returns the loop over time and the innermost loop within it that are around a place."""
    loop, block = kernel.time_loop, kernel.flow.block_of[place]
    if loop is None or block not in loop.blocks:
        return None, None
    inner = [other for other in kernel.flow.inner(loop) if block in other.blocks]
    return loop, min(inner, key=lambda other: len(other.blocks), default=None)


def _check_wait(kernel: Kernel) -> Iterator[Finding]:
    """Checks that a program waits until all members have arrived for the step, and no longer."""
    polls = [place for place, event in kernel.events.items() if event is Event.POLL]
    waits = {place: _loops_around(kernel, place) for place in polls}
    waits = {place: around for place, around in waits.items() if around[1] is not None}
    if not waits:
        yield Finding("wait", f"no loop waits for {COUNTER}")
    members = kernel.case.build.plan.members
    for place, (time, loop) in waits.items():
        if "STRONG" not in kernel[place].modifiers:
            yield Finding("wait", f"may read an old count: {kernel[place]}")
        for step in range(_STEPS):
            awaited = members * (step + 1)
            for arrived in (awaited - members, awaited - 1, awaited):
                found = _stays(kernel, place, time, loop, step, arrived)
                if found is None:
                    yield Finding("wait", f"cannot tell what is awaited: {kernel[place]}")
                    return
                if found != (arrived < awaited):
                    what = "waits on" if found else "goes on"
                    counts = f"{arrived} arrivals of {awaited}"
                    yield Finding("wait", f"{what} in step {step} with {counts}")
                    return


def _stays(kernel: Kernel, poll: int, time, loop: Loop, step: int, arrived: int) -> bool | None:
    """Returns whether a wait goes on once it has read a count; None if that is unknown."""
    # What comes from shared memory within the wait is the count, which one thread read for all.
    given = {
        place: arrived
        for place in kernel.flow.places(loop.blocks)
        if place == poll or kernel[place].opcode in ("LDS", "SHFL")
    }
    for block in loop.blocks:
        leaves = [after for after in kernel.flow.after[block] if after not in loop.blocks]
        last = kernel.flow.blocks[block][-1]
        guard = kernel[last].condition
        if len(leaves) != 1 or not guard:
            continue
        taken = kernel.holds(last, guard, loop=time, iteration=step, given=given)
        if taken is None:
            continue
        leaves_if_taken = leaves[0] != kernel.flow.block_of.get(last + 1)
        return taken != leaves_if_taken
    return None


State = str
Step = Callable[[Kernel, int, Event, State], tuple[State, Finding | None]]


def _follow(kernel: Kernel, thread: int, step: Step) -> Iterator[Finding]:
    """Yields what `step` finds along every way of a thread through the kernel, each finding once.

    A way is left out where a branch is known to lead the thread elsewhere. What is executed under a
    predicate that is not known to hold counts if it is a store or a load, and not otherwise.
    """
    found: dict[Finding, None] = {}
    at_begin: dict[int, set[State]] = {0: {"begin"}}
    waiting, header = [0], kernel.time_loop.header
    while waiting:
        block = waiting.pop()
        states = set(at_begin[block])
        for place in kernel.flow.blocks[block]:
            event = kernel.events.get(place)
            if event and _counts(kernel, place, event, thread):
                results = [step(kernel, place, event, state) for state in sorted(states)]
                states = {state for state, _ in results}
                found.update({finding: None for _, finding in results if finding})
        for after in _following(kernel, block, thread):
            leaving = states
            if after == header and block in kernel.time_loop.blocks:
                last = kernel.flow.blocks[block][-1]
                leaving = {step(kernel, last, Event.NEXT_STEP, state)[0] for state in states}
            before = at_begin.setdefault(after, set())
            if not leaving <= before:
                before |= leaving
                waiting.append(after)
    yield from found


def _counts(kernel: Kernel, place: int, event: Event, thread: int) -> bool:
    guard = kernel[place].guard
    if not guard or event in (Event.STORE, Event.LOAD):
        return True
    return event is not Event.BARRIER and bool(kernel.holds(place, guard, thread=thread))


def _following(kernel: Kernel, block: int, thread: int) -> list[int]:
    """Returns the blocks to which a thread may go."""
    last, following = kernel.flow.blocks[block][-1], kernel.flow.after[block]
    guard = kernel[last].condition
    if len(following) != 2 or not guard:
        return following
    holds = kernel.holds(last, guard, thread=thread)
    if holds is None:
        holds = _holds_in_every_step(kernel, last, guard, thread)
    if holds is None:
        return following
    below = kernel.flow.block_of.get(last + 1)
    return [after for after in following if (after != below) == holds]


def _holds_in_every_step(kernel: Kernel, place: int, guard: str, thread: int) -> bool | None:
    """Returns whether a predicate holds, where it is the same in the steps that are computed.

    So a wait is seen to be entered, where the compiler asks before it enters a loop.
    """
    loop, inner = _loops_around(kernel, place)
    if loop is None or inner is not None:
        return None
    found = {
        kernel.holds(place, guard, thread=thread, loop=loop, iteration=step)
        for step in range(_STEPS)
    }
    return found.pop() if len(found) == 1 else None


def _within_a_program(kernel: Kernel, place: int, event: Event, state: State):
    if event is Event.STORE and state != "stale":
        return "stored", None
    if event is Event.NEXT_STEP and state == "stored":
        return "stale", None
    if event is Event.BARRIER:
        return "met", None
    if event is Event.LOAD and state == "stale":
        return state, Finding("order", f"no barrier between a store of states and {kernel[place]}")
    return state, None


def _release(kernel: Kernel, place: int, event: Event, state: State):
    if event is Event.STORE:
        return "stored", None
    if event is Event.BARRIER and state == "stored":
        return "met", None
    if event is Event.FENCE and state == "met":
        return "fenced", None
    if event is Event.ARRIVAL:
        missing = {"stored": "barrier", "met": "fence behind the barrier"}.get(state)
        if missing:
            message = f"no {missing} between a store of states and {kernel[place]}"
            return "begin", Finding("release", message)
        return "begin", None
    return state, None


def _acquire(kernel: Kernel, place: int, event: Event, state: State):
    """Follows what a program has done since the arrival for the step before.

    The states are `begin`, `not arrived`, `arrived`, `polled`, `polled, met`, `invalidated` and
    `fresh`, the last of which becomes `used` in the next step: a step may read the states of the
    step before until it arrives itself.
    """
    if event is Event.NEXT_STEP:
        return {"begin": "not arrived", "used": "not arrived", "fresh": "used"}.get(
            state, state
        ), None
    if event is Event.ARRIVAL:
        return "arrived", None
    waiting = state in ("arrived", "polled", "polled, met", "invalidated", "fresh")
    if event is Event.POLL and waiting:
        return "polled", None
    if event is Event.INVALIDATION and state.startswith("polled"):
        return "invalidated", None
    if event is Event.BARRIER:
        return {"polled": "polled, met", "invalidated": "fresh"}.get(state, state), None
    missing = _MISSING.get(state)
    if event is not Event.LOAD or missing is None:
        return state, None
    at = kernel[place]
    if state.startswith("polled") and not {"STRONG", "BYPASS"} & set(at.modifiers):
        message = f"{missing} before {at}, which may read an old value from L1"
        return state, Finding("stale", message)
    return state, Finding("acquire", f"{missing} before {at}")


_MISSING = {
    "not arrived": "no arrival",
    "arrived": "no look at the counter",
    "polled": "no invalidation of L1 and no barrier behind the last look at the counter",
    "polled, met": "no invalidation of L1 behind the last look at the counter",
    "invalidated": "no barrier behind the invalidation of L1",
}
