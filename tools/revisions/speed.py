"""Is one revision as fast as another? python -m tools.revisions.speed BASE [REVISION]"""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

from benchmarks.harness.grid import FORWARD, GATED_CELLS, WORKLOADS_OF_EVERY_RUN, Workload
from benchmarks.harness.spread import speed_up_interval
from namernn_fast.bench.race import TimeBudget, race, warm_up
from namernn_fast.bench.workloads import LONGEST_NAME
from tools.revisions import builds
from tools.revisions.probes import Probe, Sizes

WORKLOADS = (
    *WORKLOADS_OF_EVERY_RUN,
    *(replace(w, cell="leaky") for w in WORKLOADS_OF_EVERY_RUN if w.cell == GATED_CELLS[0]),
)
BUDGET = TimeBudget(0, warmup_seconds=0.02, min_rounds=2, max_rounds=2)
PAUSE = 0.005
"""Seconds after which the other process's threads no longer spin."""
TOLERANCE = 1.04
"""A workload is slower if its whole interval exceeds this ratio of new to old time."""

Times = tuple[float, float]
"""The seconds of the calls of a round, old and new."""


class Ratio(NamedTuple):
    """The speed-up of the new revision (old time / new time), with a 95 % interval."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, pairs: list[Times]) -> "Ratio":
        """Returns the ratio of the medians of paired times."""
        old, new = zip(*pairs, strict=True)
        low, high = speed_up_interval(old, new)
        return cls(low, statistics.median(old) / statistics.median(new), high)

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def probe_of(workload: Workload) -> Probe:
    """Returns a probe of a workload's call that older revisions can run, too."""
    *features, steps = workload.input_size, workload.hidden_size, workload.seq_len
    return Probe(
        Sizes(*features, steps or LONGEST_NAME, workload.batch),
        layout="dense" if steps else "packed unsorted",
        hx=False,
        wanted="nothing" if workload.mode == FORWARD else "weights",
        cell=workload.cell,
    )


def ask(process: subprocess.Popen[str], what: dict | int) -> None:
    """Sends a request to a process that runs `repeat`, and waits for the confirmation."""
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()
    if not process.stdout.readline():
        raise SystemExit(f"a process exited with code {process.wait()}; the request was {what}")


def time_rounds(
    base: builds.Build, new: builds.Build, threads: int, workloads: list[Workload]
) -> list[tuple[Times, ...]]:
    """Starts one process per build, times both in turns, and returns rounds of all workloads.

    A process makes many short calls per request, because a request takes about 50 µs.
    """
    repeat = ("-m", "tools.revisions.repeat", str(threads))
    found = []
    with base.start(*repeat) as old, new.start(*repeat) as newer:
        for workload in workloads:
            for process in (old, newer):
                ask(process, asdict(probe_of(workload)))
            fastest = warm_up(partial(ask, old, 1), BUDGET.warmup_seconds)
            calls = max(1, round(BUDGET.round_seconds / fastest))
            raced = {"old": partial(ask, old, calls), "new": partial(ask, newer, calls)}
            rounds = race(raced, BUDGET, PAUSE)
            found.append([*zip(rounds["old"].seconds, rounds["new"].seconds, strict=True)])
    return [*zip(*found, strict=True)]


def mean_of(pairs: tuple[Times, ...]) -> Times:
    """Returns each build's geometric mean time over the workloads of a round."""
    old, new = zip(*pairs, strict=True)
    return statistics.geometric_mean(old), statistics.geometric_mean(new)


def verdict(workloads: dict[Workload, Ratio], mean: Ratio) -> list[str]:
    """Returns a sentence for each way in which the newer revision is slower."""
    wrong = [
        f"{workload} is more than {TOLERANCE - 1:.0%} slower: {ratio}"
        for workload, ratio in workloads.items()
        if ratio.high < 1 / TOLERANCE
    ]
    return wrong + ([f"the geometric mean is slower: {mean}"] if mean.high < 1 else [])


def main() -> bool:
    """Prints a table, and returns False if the newer revision is significantly slower."""
    parser = builds.parser(__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--laps", type=int, default=6, help="laps over the grid, of 2 rounds each")
    parser.add_argument(
        "--workloads", default="", metavar="REGEX", help="time only workloads whose names match"
    )
    options = parser.parse_args()
    base, new = builds.build(options.base), builds.build(options.revision)
    workloads = [workload for workload in WORKLOADS if re.search(options.workloads, str(workload))]
    if not workloads:
        parser.error(f"no workload matches {options.workloads!r}")
    count = len(workloads)
    print(f"{base} against {new}: {count} workloads, {options.threads} thread(s)", flush=True)
    rounds = []
    for lap in range(options.laps):
        rounds += time_rounds(base, new, options.threads, workloads)
        print(f"  lap {lap + 1} of {options.laps}", flush=True)
    ratios = {
        workload: Ratio.of([pairs[i] for pairs in rounds]) for i, workload in enumerate(workloads)
    }
    mean = Ratio.of([mean_of(pairs) for pairs in rounds])
    print("Old time over new time, above 1 if the new revision is faster, with 95 % intervals:")
    ordered = sorted(ratios.items(), key=lambda item: item[1].middle)
    for name, ratio in (*ordered, ("geometric mean", mean)):
        print(f"  {name!s:<44}  {ratio}")
    wrong = verdict(ratios, mean)
    unsettled = sum(ratio.low <= 1 / TOLERANCE <= ratio.high for ratio in ratios.values())
    if wrong:
        print("\n".join(wrong))
    elif unsettled:
        print(
            f"Not shown to be slower, but {unsettled} of {count} intervals include more than "
            f"{TOLERANCE - 1:.0%} slower: use more --laps, or a quieter machine."
        )
    else:
        print("As fast.")
    return not wrong


if __name__ == "__main__":
    sys.exit(not main())
