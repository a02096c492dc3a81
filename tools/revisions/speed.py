"""Is one revision as fast as another? python -m tools.revisions.speed BASE [REVISION]"""

import json
import os
import re
import statistics
import sys
from dataclasses import asdict
from typing import NamedTuple

from benchmarks.harness.grid import WORKLOADS_OF_EVERY_RUN, Workload
from benchmarks.harness.spread import speed_up_interval
from tools.revisions import builds

TOLERANCE = 1.04
"""A workload is slower if its whole interval exceeds this ratio of new to old time."""

Times = tuple[float, float]
"""The seconds of a call, old and new."""


class Ratio(NamedTuple):
    """Old time over new time, above 1 if the new revision is faster, with a 95 % interval."""

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


def time_round(
    base: builds.Build, new: builds.Build, threads: int, number: int, workloads: list[Workload]
) -> list[Times]:
    """Times every workload once, with a fresh process per build.

    The processes alternate at each workload. Which one starts alternates too, so that drift
    cancels out.
    """
    stopwatch = ("-m", "tools.revisions.stopwatch", str(threads))
    found = []
    with base.start(*stopwatch) as old, new.start(*stopwatch) as newer:
        for index, workload in enumerate(workloads):
            seconds = {}
            for process in (old, newer) if (number + index) % 2 else (newer, old):
                process.stdin.write(json.dumps(asdict(workload)) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    raise SystemExit(f"{workload}: the stopwatch exited with {process.wait()}")
                seconds[process] = float(answer)
            found.append((seconds[old], seconds[newer]))
    return found


def mean_of(pairs: list[Times]) -> Times:
    """Returns the geometric mean over the workloads of a round, for both builds."""
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
    """Prints a table, and returns True unless the newer revision is shown to be slower."""
    parser = builds.parser(__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=12, help="rounds over the whole grid")
    parser.add_argument(
        "--workloads", default="", metavar="REGEX", help="time only workloads whose names match"
    )
    options = parser.parse_args()
    base, new = builds.build(options.base), builds.build(options.revision)
    cells = builds.common_cells(base, new)
    grid = [workload for workload in WORKLOADS_OF_EVERY_RUN if workload.cell in cells]
    workloads = [workload for workload in grid if re.search(options.workloads, str(workload))]
    if not workloads:
        parser.error(f"no workload matches {options.workloads!r}")
    count = len(workloads)
    print(f"{base} against {new}: {count} workloads, {options.threads} thread(s)", flush=True)
    rounds = []
    for number in range(options.rounds):
        rounds.append(time_round(base, new, options.threads, number, workloads))
        print(f"  round {number + 1} of {options.rounds}", flush=True)
    ratios = {
        workload: Ratio.of([pairs[i] for pairs in rounds]) for i, workload in enumerate(workloads)
    }
    mean = Ratio.of([mean_of(pairs) for pairs in rounds])
    print("Old time over new time, above 1 if the new revision is faster, with 95 % intervals:")
    for name, ratio in {**ratios, "geometric mean": mean}.items():
        print(f"  {name!s:<44}  {ratio}")
    wrong = verdict(ratios, mean)
    unsettled = sum(ratio.low <= 1 / TOLERANCE <= ratio.high for ratio in ratios.values())
    if wrong:
        print("\n".join(wrong))
    elif unsettled:
        print(
            f"Not shown to be slower, but {unsettled} of {count} intervals include more than "
            f"{TOLERANCE - 1:.0%} slower: use more --rounds, or a quieter machine."
        )
    else:
        print("As fast.")
    return not wrong


if __name__ == "__main__":
    sys.exit(not main())
