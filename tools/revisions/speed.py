"""Compares the speed of two builds: pairs of fresh processes take turns at every cell of a grid."""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.revisions.builds import Build, command, environment_of
from tools.revisions.cells import CELLS
from tools.revisions.intervals import TOLERANCE, Interval, interval

TURN_SECONDS = 0.05
"""The time for which a build is called in one turn."""
LONG_SECONDS = 0.4
"""A call of at least this time gets one turn in a round, a shorter one gets two."""

IMPORT = """
import time, torch
start = time.perf_counter()
import namernn_fast
print(time.perf_counter() - start)
"""


class Runner:
    """A process that times the cells of one build."""

    def __init__(self, build: Build, threads: int):
        self.build = build
        self.process = subprocess.Popen(
            command(build, "stopwatch", "--threads", str(threads)),
            cwd=build.library,
            env=environment_of(build),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, cell: str, seconds: float) -> float:
        """Returns the median time of a call of a cell, or its expected time for 0 seconds."""
        self.process.stdin.write(json.dumps({"cell": cell, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.build}: the stopwatch ended with {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Record:
    """All pairs of times that were measured."""

    rows: list[dict] = field(default_factory=list)
    """For each round and cell, the seconds of both builds."""

    def logarithms(self, cell: str) -> list[float]:
        """Returns the logarithms of the paired ratios of a cell, old time over new time."""
        return [math.log(r["base"] / r["new"]) for r in self.rows if r["cell"] == cell]

    def cell(self, cell: str) -> Interval:
        """Returns the interval of a cell."""
        return interval(self.logarithms(cell))

    def mean(self, cells: list[str]) -> Interval:
        """Returns the interval of the geometric mean, from the rounds that timed every cell."""
        by_round: dict[int, list[float]] = {}
        for row in self.rows:
            by_round.setdefault(row["round"], []).append(math.log(row["base"] / row["new"]))
        whole = [found for found in by_round.values() if len(found) == len(cells)]
        return interval([statistics.fmean(found) for found in whole])


def order_of(number: int, index: int, turns: int) -> tuple[str, ...]:
    """Returns whose turn it is when a round measures a cell, both given by number.

    Base, new, new, base: a steady drift cancels within a pair of turns each. Every other round and
    cell begins with the newer build, and a cell with one turn each cancels drift over two rounds.
    """
    order = ("base", "new") if (number + index) % 2 == 0 else ("new", "base")
    return order if turns == 1 else (*order, *reversed(order))


def run_round(base: Build, new: Build, threads: int, number: int, cells: list[str]) -> list[dict]:
    """Times some cells once, in a fresh process for each build.

    Returns:
        A row for each cell, with the geometric means of both builds' turns in seconds.
    """
    rows = []
    with Runner(base, threads) as old, Runner(new, threads) as newer:
        runners = {"base": old, "new": newer}
        for index, cell in enumerate(cells):
            expected = max(runners[side].time(cell, 0) for side in order_of(number, index, 1))
            turns: dict[str, list[float]] = {"base": [], "new": []}
            for side in order_of(number, index, 1 if expected >= LONG_SECONDS else 2):
                turns[side].append(runners[side].time(cell, TURN_SECONDS))
            means = {side: statistics.geometric_mean(times) for side, times in turns.items()}
            rows.append({"round": number, "cell": cell, **means})
    return rows


def measure(base: Build, new: Build, options: argparse.Namespace, cells: list[str]) -> Record:
    """Runs rounds over the whole grid, then over the cells that are not settled.

    A round is begun if it is expected to end in time.
    """
    record = Record()
    deadline = time.perf_counter() + 60 * options.minutes
    left, number, per_cell = cells, 0, 0.0
    while left and (number == 0 or time.perf_counter() + per_cell * len(left) < deadline):
        begun = time.perf_counter()
        record.rows += run_round(base, new, options.threads, number, left)
        seconds = time.perf_counter() - begun
        per_cell, number = seconds / len(left), number + 1
        unsettled = [cell for cell in cells if not record.cell(cell).settled]
        print(
            f"  round {number}: {len(left)} cells in {seconds:.0f} s, "
            f"{len(unsettled)} of {len(cells)} not settled",
            flush=True,
        )
        if number >= options.rounds:
            left = unsettled
    return record


def import_times(base: Build, new: Build, count: int) -> dict[str, list[float]]:
    """Times the import of both libraries, after torch, in fresh processes that take turns."""
    times: dict[str, list[float]] = {"base": [], "new": []}
    for number in range(count):
        for side in order_of(number, 0, 1):
            build = base if side == "base" else new
            ran = subprocess.run(
                [sys.executable, "-c", IMPORT],
                cwd=build.library,
                env=environment_of(build),
                check=True,
                capture_output=True,
                text=True,
            )
            times[side].append(float(ran.stdout))
    return times


def verdict(cells: dict[str, Interval], mean: Interval) -> list[str]:
    """Returns what is wrong with the newer revision's speed, one sentence each."""
    wrong = [
        f"{name} is more than {TOLERANCE - 1:.0%} slower: {found}"
        for name, found in cells.items()
        if found.much_slower
    ]
    return wrong + ([f"the geometric mean is slower: {mean}"] if mean.slower else [])


def conclusion(cells: dict[str, Interval]) -> str:
    """Returns what can be said of a newer revision that is not shown to be slower."""
    unsettled = sum(not found.settled for found in cells.values())
    if not unsettled:
        return "As fast."
    return (
        f"Not shown to be slower, but {unsettled} of {len(cells)} intervals reach beyond "
        f"{TOLERANCE - 1:.0%} slower: measure for more --minutes, or on a quieter machine."
    )


def report_costs(base: Build, new: Build, imports: dict[str, list[float]]) -> None:
    """Prints what building and importing cost before and after, and how large the library is."""
    for side, build in (("base", base), ("new", new)):
        megabytes = build.extension.stat().st_size / 1e6
        print(
            f"{build}: built in {build.processor_seconds:.0f} s of processor time "
            f"({build.seconds:.0f} s on the clock), an extension of {megabytes:.1f} MB, "
            f"imported in {1e3 * statistics.median(imports[side]):.1f} ms",
            flush=True,
        )


def compare_builds(base: Build, new: Build, options: argparse.Namespace) -> bool:
    """Compares the speed of two builds.

    Args:
        base: the older build.
        new: the newer build.
        options: threads, rounds, minutes, cells (a regular expression), imports and cache.

    Returns:
        Whether the newer build is as fast.
    """
    cells = [name for name in CELLS if re.search(options.cells, name)]
    if not cells:
        raise RuntimeError(f"no cell matches {options.cells!r}")
    print(f"{base} against {new}: {len(cells)} cells, {options.threads} thread(s)", flush=True)
    report_costs(base, new, import_times(base, new, options.imports))
    record = measure(base, new, options, cells)
    path = Path(options.cache) / f"speed-{base.tree[:8]}-{new.tree[:8]}-{options.threads}.json"
    path.write_text(json.dumps(record.rows, indent=1))
    found = {cell: record.cell(cell) for cell in cells}
    mean = record.mean(cells)
    print("Old time over new time, above 1 where the new revision is faster, with 95 % intervals:")
    width = max(map(len, cells))
    for cell, ratio in found.items():
        print(f"  {cell:<{width}}  {ratio}{'' if ratio.settled else '  not settled'}")
    print(f"  {'geometric mean':<{width}}  {mean}")
    wrong = verdict(found, mean)
    print("\n".join(wrong) if wrong else conclusion(found))
    print(f"Every pair of times is in {path}.")
    return not wrong
