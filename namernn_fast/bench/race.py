"""Compares the speed of several calls on a machine whose own speed drifts.

If the calls were timed one after another, the machine's speed could change in between. Therefore
the calls alternate in rounds of tens of milliseconds, in one process: A B, B A, A B, … A temporary
slowdown of the machine then affects all calls alike, so their medians are comparable.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TimedCall = Callable[[], Any]
"""A call that a race repeats and times."""

# Just below 32 MiB, the maximum of glibc's dynamic mmap threshold.
LARGEST_KEPT_BYTES = 31 * 2**20


@dataclass(frozen=True)
class TimeBudget:
    """The total time for all calls of one workload, and the number of rounds."""

    seconds: float = 2.0
    warmup_seconds: float = 0.05
    round_seconds: float = 0.02
    min_rounds: int = 7
    """Also for slow calls: with fewer rounds, a short disturbance could shift the median."""
    max_rounds: int = 50


QUICK = TimeBudget(0.02, warmup_seconds=0.002, round_seconds=0.002, min_rounds=2, max_rounds=5)


@dataclass(frozen=True)
class Rounds:
    """The rounds of one call: the iterations per round, and the seconds per iteration."""

    iterations: int
    seconds: tuple[float, ...]


def keep_freed_memory() -> None:
    """Makes the allocator keep freed memory, as in a process that has run for a long time.

    glibc keeps freed memory for reuse up to a threshold that grows with the largest block freed so
    far. In a fresh process, page faults on new memory make the forward pass of nn.RNN up to twice
    as slow, so the benchmark would overstate the speed-ups of the first workloads.
    """
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)


def timed(call: TimedCall, iterations: int = 1) -> float:
    """Runs one round of `iterations` calls and returns the seconds per call."""
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    return (time.perf_counter() - start) / iterations


Clock = Callable[[TimedCall, int], float]
"""Runs one round of a call, as `timed` does. A clock for GPUs also waits for the device."""


def warm_up(call: TimedCall, seconds: float, clock: Clock = timed) -> float:
    """Repeats the call for about `seconds`, at least once; returns the fastest time in seconds."""
    deadline = time.perf_counter() + seconds
    fastest = clock(call, 1)
    while time.perf_counter() < deadline:
        fastest = min(fastest, clock(call, 1))
    return fastest


def race(
    calls: Mapping[str, TimedCall],
    budget: TimeBudget,
    pause: float = 0.0,
    clock: Clock = timed,
) -> dict[str, Rounds]:
    """Times the calls in alternating rounds within the budget; returns the rounds of each call.

    Args:
        calls: the calls by name.
        budget: the time for all calls.
        pause: seconds to wait before each round, so that spinning threads of another runtime go to
            sleep. An untimed call then wakes the threads that the round uses.
        clock: runs and times a round.
    """
    fastest = {name: warm_up(call, budget.warmup_seconds, clock) for name, call in calls.items()}
    iterations = {name: max(1, round(budget.round_seconds / fastest[name])) for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    deadline = time.perf_counter() + budget.seconds
    for lap in range(budget.max_rounds):
        if lap >= budget.min_rounds and time.perf_counter() > deadline:
            break
        for name in order:
            if pause:
                time.sleep(pause)
                calls[name]()
            seconds[name].append(clock(calls[name], iterations[name]))
        # Alternate the order, because the state of the caches depends on the previous call.
        order.reverse()
    return {name: Rounds(iterations[name], tuple(seconds[name])) for name in calls}
