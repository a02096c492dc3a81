"""Times programs of the names classifier: `python -m benchmarks.names.classifier [--record]`.

Two programs train and use the plain network: the names application, and a program that a user would
write with `nn.RNN` and `DataLoader`. First the gate checks losses and labels against an oracle.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import pages
from benchmarks.harness.machine import momentary_rate
from benchmarks.harness.paths import PERFORMANCE_TABLES, Section
from benchmarks.names import data, gate, memory
from benchmarks.names.classifier_report import report
from benchmarks.names.data import Corpus
from benchmarks.names.programs import (
    PROGRAMS,
    SETTINGS,
    Application,
    Program,
    Settings,
    Weights,
    WithTorch,
    starting_weights,
)
from benchmarks.names.stopwatch import time_training
from benchmarks.names.work import count, count_batches, floor
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import Rounds, TimeBudget, TimedCall, race
from namernn_fast.names import ASCII, split
from namernn_fast.names.distillation import made_up_names

STARTED = time.perf_counter()
Row = dict[str, Any]

STRETCH = 1024
"""The approximate number of names per stretch of an epoch; at least two batches."""
GATE_BATCHES = (16, 128)
"""Names per batch of the steps with checked losses."""
CHECKED_LABELS = 5_000
TWICE = TimeBudget(0, warmup_seconds=0, round_seconds=0, min_rounds=2)
ONCE = TimeBudget(0, warmup_seconds=0, round_seconds=0, min_rounds=1)
"""One round: labelling many names takes long enough to average out drift."""


class Effort(NamedTuple):
    """The amount of work in a run."""

    corpus: int | None
    """The number of names from the data; None for all."""
    batches: tuple[int, ...]
    """Names per training batch."""
    steps: int
    """The number of steps with checked losses."""
    made_up: int
    """The number of made-up names to label; on one thread and for memory, a third of them."""


TRIAL = Effort(corpus=600, batches=(16, 64), steps=20, made_up=6_000)
USUAL = Effort(corpus=None, batches=(64,), steps=100, made_up=50_000)
RECORDED = Effort(corpus=None, batches=(16, 64, 256, 1024), steps=100, made_up=300_000)


def announce(stage: str) -> None:
    """Prints the elapsed time and the current stage."""
    print(f"{time.perf_counter() - STARTED:4.0f} s: {stage}", flush=True)


def stretches(order: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Splits an epoch's order, int64 `(names,)`, into stretches with equal numbers of full batches.

    Leftover names are not used.
    """
    size = max(2, min(STRETCH, len(order)) // batch_size) * batch_size
    return order.split(size)[: len(order) // size]


def trainer(
    program: Program, parts: Sequence[Tensor], batch_size: int, recorded: list[dict[str, float]]
) -> TimedCall:
    """Returns a call that trains on the next stretch and appends its times to `recorded`."""
    turns = itertools.cycle(parts)
    return lambda: recorded.append(time_training(program, next(turns), batch_size))


def fastest_settings(
    corpus: Corpus, weights: Weights, parts: Sequence[Tensor], batch_size: int
) -> Settings:
    """Returns the settings with which the user's program is fastest on this machine."""
    calls = {
        str(settings): trainer(WithTorch(corpus, weights, settings), parts, batch_size, [])
        for settings in SETTINGS
    }
    rounds = race(calls, TWICE)
    return min(SETTINGS, key=lambda settings: min(rounds[str(settings)].seconds))


def race_at_peak(
    calls: Mapping[str, TimedCall], threads: int, budget: TimeBudget
) -> tuple[dict[str, Rounds], float]:
    """Times calls in turns; returns their rounds, and the machine's peak operations per second."""
    peaks: list[float] = []
    rounds = race({**calls, "peak": lambda: peaks.append(threads * momentary_rate())}, budget)
    return rounds, max(peaks)  # an interrupted probe reads too low


def race_epochs(
    corpus: Corpus, weights: Weights, threads: int, batch_size: int, budget: TimeBudget
) -> list[Row]:
    """Returns a row for each program: how long an epoch and each phase of it took, in seconds."""
    order = torch.randperm(len(corpus.names), generator=torch.Generator().manual_seed(1))
    parts = stretches(order, batch_size)
    settings = fastest_settings(corpus, weights, parts, batch_size)
    programs = (WithTorch(corpus, weights, settings), Application(corpus, weights))
    times: dict[str, list[dict[str, float]]] = {program.name: [] for program in programs}
    calls = {p.name: trainer(p, parts, batch_size, times[p.name]) for p in programs}
    rounds, peak = race_at_peak(calls, threads, budget)
    texts = ASCII.fold_usable(corpus.names)
    counts = count_batches([texts[i] for i in batch.tolist()] for batch in order.split(batch_size))
    rows = []
    for program in programs:
        recorded = times[program.name][-len(rounds[program.name].seconds) :]  # without warm-up
        row = {
            "threads": threads,
            "batch": batch_size,
            "program": program.name,
            "seconds": epoch_seconds(recorded, len(order) / len(parts[0])),
            "rounds": len(recorded),
            "peak": peak,
            "floor": floor(counts, len(corpus.languages), True, type(program), peak),
        }
        rows.append(row | ({"settings": str(settings)} if program is programs[0] else {}))
    return rows


def epoch_seconds(recorded: Sequence[Mapping[str, float]], count: float) -> dict[str, float]:
    """Returns the seconds of each part of an epoch: its median in a stretch times `count`."""
    return {
        part: count * statistics.median(entry[part] for entry in recorded) for part in recorded[0]
    }


def race_labels(
    programs: Sequence[Program],
    corpus: Corpus,
    names: Sequence[str],
    threads: int,
    budget: TimeBudget,
) -> list[Row]:
    """Returns a row for each program, with the seconds it takes to label all names from strings."""
    calls = {program.name: partial(program.label, names) for program in programs}
    rounds, peak = race_at_peak(calls, threads, budget)
    counts = count(ASCII.fold_usable(names))
    return [
        {
            "threads": threads,
            "names": len(names),
            "program": program.name,
            "prefixes": counts["prefixes"],
            "characters": counts["characters"],
            "seconds": statistics.median(rounds[program.name].seconds),
            "rounds": len(rounds[program.name].seconds),
            "peak": peak,
            "floor": floor(counts, len(corpus.languages), False, type(program), peak),
        }
        for program in programs
    ]


def run(options: argparse.Namespace, effort: Effort, wrong: list[str]) -> dict[str, Any]:
    """Checks and measures everything; returns the raw rows.

    Adds failed checks to `wrong`. Times no epoch if losses are wrong, and no labelling on a number
    of threads with wrong labels. Measures memory and times one thread only with `--record`.
    """
    corpus = Corpus.of_data(effort.corpus)
    # The embedded sample is too small for the large batches.
    batches = [batch for batch in effort.batches if 2 * batch <= len(corpus.names)]
    made_up = [text.title() for text in made_up_names(split(data.names()), effort.made_up)]
    fewer = made_up[: len(made_up) // 3]
    budget = pages.time_budget(options, max_rounds=40, round_seconds=0.01)
    start = weights = starting_weights(len(corpus.languages))
    document: dict[str, Any] = {"data": data.description(), "names": len(corpus.names)}
    document |= {"training": [], "labels": [], "memory": []}
    pages.settle(options.threads)
    timed: list[int] = []
    with pages.gated("epochs", wrong):
        for batch_size in GATE_BATCHES:
            announce(f"checking {effort.steps} losses, B = {batch_size}")
            weights = gate.check_losses(Application, corpus, start, batch_size, effort.steps)
        timed = batches
    counts = {options.threads, 1} if options.record else {options.threads}
    for threads in sorted(counts, reverse=True):
        pages.settle(threads)
        for batch_size in timed:
            announce(f"epochs, B = {batch_size}, {threads} thread(s)")
            document["training"] += race_epochs(corpus, start, threads, batch_size, budget)
        with pages.gated(f"labels, {threads} thread(s)", wrong):
            announce(f"labels, {threads} thread(s)")
            programs = [program(corpus, weights) for program in PROGRAMS]
            gate.check_labels(programs[1], corpus, corpus.names[:CHECKED_LABELS])
            document["labels"] += race_labels(programs, corpus, corpus.names, threads, budget)
            announce("labels of made-up names")
            names = made_up if threads == options.threads else fewer
            document["labels"] += race_labels(programs, corpus, names, threads, ONCE)
    if options.record:
        announce("memory")
        document["memory"] = memory.measure(corpus, max(batches), fewer, options.threads)
    return document


SECTION = Section(PERFORMANCE_TABLES, "classifier", report)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=2.0))
    effort = TRIAL if options.quick else RECORDED if options.record else USUAL
    # The garbage collector stays on, as in a user's program, but does not traverse all of torch.
    gc.collect()
    gc.freeze()
    machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    wrong: list[str] = []
    document = {"machine": machine, **run(options, effort, wrong)}
    pages.publish("classifier", document, [SECTION], options.record, wrong)


if __name__ == "__main__":
    main()
