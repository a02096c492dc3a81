"""Defines `Study`, the base class of the programs in `benchmarks/cpu`.

`Study.main` is the whole program. For each case it creates the calls, checks their results and
times the calls in alternating rounds. Then it publishes a row for each case.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import pages
from benchmarks.harness.columns import Row, Rows, labels
from benchmarks.harness.grid import FORWARD, MODES, Workload
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.harness.spread import paired_speed_up, speed_up_interval
from namernn_fast import ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import Rounds, TimeBudget, TimedCall, race
from namernn_fast.bench.tables import duration
from namernn_fast.bench.timed_calls import Input
from namernn_fast.testing import BudgetError

Document = dict[str, Any]
Calls = Mapping[str, TimedCall]
AGAIN = "again"
"""The key of a document for the rows of a second run."""
CheckedCalls = dict[str, TimedCall | BudgetError]
"""Calls by name. A rival with wrong results has its error instead of its call."""
QUICK_CASES = 3
"""The number of cases that a quick run has for each cell, family, mode and table."""


def draw_input(workload: Workload, lengths: Sequence[int] = ()) -> Input:
    """Returns a dense time-major input, or a packed one with these lengths."""
    torch.manual_seed(1)
    steps = workload.seq_len or max(lengths)
    input = torch.randn(steps, workload.batch, workload.input_size)
    return pack_padded_sequence(input, lengths, enforce_sorted=False) if lengths else input


def grid(
    shapes: Sequence[tuple[int, int, int, int]],
    cells: Sequence[str],
    modes: Sequence[str] = MODES,
    make: Callable[..., Workload] = Workload,
    **also: Any,
) -> list[Any]:
    """Returns a case of class `make`, with the fields `also`, for each mode, cell and shape.

    A shape is the input size, the hidden size, the sequence length and the batch size.
    """
    return [
        make("dense", mode, batch, input_size, hidden_size, steps, cell, **also)
        for mode in modes
        for cell in cells
        for input_size, hidden_size, steps, batch in shapes
    ]


def statistics_of(rounds: Mapping[str, Rounds], ours: str = "") -> Row:
    """Returns the medians and rounds of each call, and compares the other calls with `ours`."""
    seconds = {name: recorded.seconds for name, recorded in rounds.items()}
    row: Row = {
        "medians": {name: statistics.median(times) for name, times in seconds.items()},
        "iterations": {name: recorded.iterations for name, recorded in rounds.items()},
        "seconds": {name: [float(f"{s:.6g}") for s in times] for name, times in seconds.items()},
    }
    if ours in seconds:
        mine = seconds.pop(ours)
        row["paired"] = {name: paired_speed_up(times, mine) for name, times in seconds.items()}
        row["spread"] = {name: speed_up_interval(times, mine) for name, times in seconds.items()}
    return row


def kernels() -> Document:
    """Returns the CPU kernels of bfloat16, 8-bit integers and float32."""
    found = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}
    return {name: f"cpu {ops.cpu_kernel(dtype)}" for name, dtype in found.items()}


@dataclass(frozen=True)
class Study:
    """A program that times alternating calls, and reports the times.

    Each case is a workload, or an instance of a subclass with additional fields.
    """

    name: str
    """The name of the results, and of the section of the page."""
    description: str
    """The docstring of the program."""
    cases: Sequence[Any]
    table: Callable[[Rows], str]
    """Returns a table of rows."""
    caption: Callable[[Document], str]
    """Returns the text between the description of the machine and the tables."""
    calls: Callable[[Any], Mapping[str, TimedCall | BudgetError]] = lambda case: {}
    """Returns the checked calls of a case. Raises `BudgetError` if a result of ours is wrong."""
    by: Sequence[str] = ("mode",)
    """Fields; there is a table for each combination of their values."""
    is_folded: bool = False
    """Whether the page folds the tables."""
    ours: str = ""
    """The call that the others are compared with; default: the fused layer."""
    also: Callable[[Any, Calls], Row] = lambda case, calls: {}
    """Returns further fields of a row. Raises `BudgetError` if a result is wrong."""
    of_records: Callable[[Any], Row] = lambda case: {}
    """Returns fields that only recorded runs measure."""
    facts: Callable[[], Document] = dict
    """Returns further fields of the document."""
    few: Callable[[Any], bool] = lambda case: True
    """Returns whether an unrecorded run times a case."""
    one_thread_too: bool = False
    """Whether a recorded run also times one thread."""
    seconds: float = 0.5
    max_rounds: int = 20
    round_seconds: float = 0.01
    pause: float = 0.0
    """Seconds before each round; see `race`."""
    page: Path = PERFORMANCE_TABLES
    more: Sequence[Section] = ()
    """Further texts about the results."""
    draw: Callable[[Document, Path], list[Path]] = lambda document, folder: []
    """Draws the plots of the results in a folder, and returns their files."""

    def measure(self, case: Any, budget: TimeBudget) -> Row:
        """Times a case. Returns the measured fields of its row."""
        checked = self.calls(case)
        wrong = {name: str(call) for name, call in checked.items() if isinstance(call, BudgetError)}
        calls = {name: call for name, call in checked.items() if name not in wrong}
        also = self.also(case, calls) | ({"wrong": wrong} if wrong else {})
        ours = self.ours or case.layers.fused
        return statistics_of(race(calls, budget, self.pause), ours) | also

    def chosen(self, options: argparse.Namespace) -> list[Any]:
        """Returns the cases to time. With `--quick`, these are the smallest of each kind."""
        cases = [case for case in self.cases if options.record or self.few(case)]
        if not options.quick:
            return cases
        kinds: dict[tuple[Any, ...], list[Any]] = {}
        for case in sorted(cases, key=lambda case: case.batch * case.row_work):
            kind = (getattr(case, field, None) for field in ("cell", "family", "mode", *self.by))
            kinds.setdefault(tuple(kind), []).append(case)
        return [case for found in kinds.values() for case in found[:QUICK_CASES]]

    def run(self, options: argparse.Namespace, wrong: list[str]) -> Rows:
        """Times the cases; returns a row for each, and adds failed checks to `wrong`."""
        one = [1] if self.one_thread_too and options.record else []
        counts = sorted({*one, options.threads})
        return [row for threads in counts for row in self.run_on(threads, options, wrong)]

    def run_on(self, threads: int, options: argparse.Namespace, wrong: list[str]) -> Rows:
        """Times the cases on `threads` threads, as `run` describes."""
        rows: Rows = []
        budget = pages.time_budget(options, self.max_rounds, self.round_seconds)
        pages.settle(threads)
        # The garbage collector stays on, as in a user's program, but must not traverse all of torch
        # during a timed round.
        gc.collect()
        gc.freeze()
        chosen, start = self.chosen(options), time.perf_counter()
        for done, case in enumerate(chosen):
            name = f"{described(case)}, {threads} thread(s)"
            with pages.gated(name, wrong), torch.inference_mode(case.mode == FORWARD):
                found = self.measure(case, budget)
                found |= self.of_records(case) if options.record else {}
                rows.append({**asdict(case), "threads": threads, **found})
                times = (f"{call} {duration(s)}" for call, s in found["medians"].items())
                line = "  ".join((name, *times, *wrong_rivals([found])))
                left = (time.perf_counter() - start) / (done + 1) * (len(chosen) - done - 1)
                print(f"{done + 1}/{len(chosen)}, {left:.0f} s left: {line}", flush=True)
        gc.unfreeze()
        return rows

    def report(self, document: Document) -> str:
        """Returns the caption and the tables of a run."""
        parts = [f"{machine(document)}; {self.caption(document)}"]
        groups: dict[tuple[Any, ...], Rows] = {}
        for row in document["rows"]:
            groups.setdefault(tuple(row[field] for field in self.by), []).append(row)
        for values, rows in groups.items():
            title = labels(self.by, values)
            tables = [self.table(rows), *wrong_rivals(rows)]
            if self.is_folded:
                tables = [
                    f"<details>\n<summary>{title or 'The table'}</summary>",
                    *tables,
                    "</details>",
                ]
            elif title:
                parts.append(f"**{title}**")
            parts += tables
        return "\n\n".join(parts)

    def main(self, options: argparse.Namespace | None = None, *, again: bool = False) -> None:
        """Runs the program. By default, `options` come from the command line.

        If `again`, this is a second run: its rows are added to the recorded document.
        """
        options = options or pages.parse(pages.parser(self.description, self.seconds))
        wrong: list[str] = []
        rows = self.run(options, wrong)
        document: Document = {"cpu": cpu_name(), "torch": torch.__version__, **self.facts()}
        document["threads"] = [*dict.fromkeys(row["threads"] for row in rows)]
        counts = [len(times) for row in rows for times in row["seconds"].values()]
        document["rounds"] = [min(counts, default=0), max(counts, default=0)]
        document["rows"] = rows
        if again:
            document = pages.recorded(self.name) | {AGAIN: rows}
        sections = self.sections if rows else ()
        pages.publish(self.name, document, sections, options.record, wrong, self.draw)

    @property
    def sections(self) -> tuple[Section, ...]:
        """The generated sections of pages that describe the results."""
        return Section(self.page, self.name, self.report), *self.more


def machine(document: Document) -> str:
    """Describes the machine, the numbers of threads, torch's version and the rounds of a run."""
    threads = " and ".join(map(str, document["threads"]))
    torch_version = f"; torch {document['torch']}" if "torch" in document else ""
    rounds = " to ".join(dict.fromkeys(map(str, document.get("rounds", ()))))
    medians = f"; medians of {rounds} rounds" if rounds else ""
    return f"{document['cpu']}, {threads} thread(s){torch_version}{medians}"


def wrong_rivals(rows: Rows) -> list[str]:
    """Returns a sentence for each rival that was not timed in some rows due to wrong results."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, error in row.get("wrong", {}).items():
            found.setdefault(name, []).append(error)
    return [
        f"{name} is wrong in {len(errors)} of {len(rows)} rows, and not timed there: {errors[0]}."
        for name, errors in found.items()
    ]


def described(case: Workload) -> str:
    """Returns the name of a workload, with the additional fields of its class."""
    known = {field.name for field in fields(Workload)}
    also = (f"{name} {value}" for name, value in asdict(case).items() if name not in known)
    return ", ".join((str(case), *also))
