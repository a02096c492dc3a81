"""Times whole programs before and after a change, in alternating rounds."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import pages
from benchmarks.harness.columns import Row, Rows
from benchmarks.harness.grid import FORWARD, TRAINING
from benchmarks.harness.study import Study, statistics_of
from namernn_fast.bench.race import Rounds, timed
from namernn_fast.testing import assert_within_budget, max_error

Run = Callable[[], Tensor | float]
"""Runs the timed part and returns its results."""
BEFORE, AFTER = ROLES = "before", "after"
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Program:
    """A program to time, which makes one row of the table."""

    name: str
    before: Callable[[], Run]
    after: Callable[[], Run]
    exact: Callable[[], Run]
    """Like `before`, with recurrent layers that compute in float64."""
    also: Mapping[str, Any]
    """Further fields of the row."""
    package: str = "torch"
    """The package that the program needs; it is left out if the package is missing."""
    mode: str = TRAINING


def take_turns(programs: Mapping[str, Run], seconds: float) -> dict[str, Rounds]:
    """Runs the programs in alternation. Returns at least three rounds of each."""
    times: dict[str, list[float]] = {role: [] for role in programs}
    deadline = time.perf_counter() + seconds
    while len(times[AFTER]) < MIN_ROUNDS or time.perf_counter() < deadline:
        for role, run in programs.items():
            times[role].append(timed(run))
    return {role: Rounds(1, tuple(found)) for role, found in times.items()}


class BeforeAfter(Study):
    """A study that times whole programs before and after a change."""

    def measure_program(self, program: Program, seconds: float) -> Row:
        """Returns the row of a program.

        Raises:
            BudgetError: the results after the change exceed the error budget.
        """
        runs: dict[str, Run] = {}
        results: dict[str, Tensor] = {}
        for role in ("exact", *ROLES):
            runs[role] = getattr(program, role)()
            # Run each program before creating the next, because all use torch's global generator.
            results[role] = torch.as_tensor(runs[role](), dtype=torch.float32)
        del runs["exact"]
        theirs, ours, exact = ({"result": results[role]} for role in (BEFORE, AFTER, "exact"))
        assert_within_budget(ours, theirs, exact)
        difference = max_error(results[AFTER], results[BEFORE])
        found = statistics_of(take_turns(runs, seconds), AFTER)
        version = getattr(sys.modules[program.package], "__version__", None)
        also = {**program.also, "version": version and f"{program.package} {version}"}
        return {"name": program.name, **also, "difference": difference, **found}

    def run(self, options: argparse.Namespace, wrong: list[str]) -> Rows:
        """Times the programs; returns a row for each, and adds failed checks to `wrong`."""
        pages.settle(options.threads)
        rows: Rows = []
        for program in self.cases:
            if importlib.util.find_spec(program.package) is None:
                print(f"{program.name}: left out, because {program.package} is not installed")
                continue
            with pages.gated(program.name, wrong), torch.inference_mode(program.mode == FORWARD):
                row = self.measure_program(program, 0.0 if options.quick else options.seconds)
                rows.append(row | {"threads": options.threads})
                print(program.name, row["medians"], flush=True)
        return rows
