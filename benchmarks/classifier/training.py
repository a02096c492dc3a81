"""Races training epochs: the programs alternate on stretches of a few batches."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.classifier.effort import Effort
from benchmarks.classifier.program import Corpus, Program
from benchmarks.classifier.rivals import PROGRAMS
from benchmarks.classifier.stopwatch import TOTAL, Stopwatch
from benchmarks.classifier.with_torch import Settings, WithTorch
from benchmarks.classifier.work import count_batches, floor
from benchmarks.harness.machine import momentary_rate
from namernn_fast.bench.race import TimeBudget, race
from namernn_fast.names import ASCII

SETTINGS_BUDGET = TimeBudget(0, warmup_seconds=0, round_seconds=0, min_rounds=2)

Weights = dict[str, Tensor]


class Course:
    """The stretches of an epoch, in a cycle.

    Args:
        names: Names per epoch.
        batch_size: Names per batch.
        stretch: Approximate number of names per stretch.
    """

    def __init__(self, names: int, batch_size: int, stretch: int):
        self.batch_size = batch_size
        self.size = max(2, stretch // batch_size) * batch_size
        if names < self.size:
            raise ValueError(f"{names} names are fewer than the {self.size} of a stretch")
        self.order = torch.randperm(names, generator=torch.Generator().manual_seed(1))
        self.stretches = self.order.split(self.size)[: names // self.size]
        """int64 `(names per stretch,)` each; leftover names are not used."""

    def runner(self, program: Program) -> tuple[Callable[[], None], Stopwatch]:
        """Returns a call that trains the program on its next stretch, and its stopwatch."""
        watch = Stopwatch(program)

        def run() -> None:
            stretch = self.stretches[len(watch.recorded) % len(self.stretches)]
            watch.train(stretch, self.batch_size)

        return run, watch


def fastest_settings(
    corpus: Corpus, weights: Weights, course: Course, choices: Sequence[Settings]
) -> Settings:
    """Returns the settings with which the user's program is fastest on this machine."""
    runners = {choice: course.runner(WithTorch(corpus, weights, choice)) for choice in choices}
    race({str(settings): run for settings, (run, _) in runners.items()}, SETTINGS_BUDGET)
    seconds = {
        settings: min(entry[TOTAL] for entry in watch.recorded[1:])
        for settings, (_, watch) in runners.items()
    }
    # A program's workers end when it is freed. If that is left to the garbage collector, it takes
    # five seconds per worker, because the queues are gone before they can stop the workers. The
    # hooks form a reference cycle with the program, so remove them.
    for _, watch in runners.values():
        watch.remove()
    return min(seconds, key=seconds.__getitem__)


def race_epochs(
    corpus: Corpus, weights: Weights, threads: int, batch_size: int, effort: Effort
) -> list[dict[str, Any]]:
    """Returns a row for each program, with the seconds of an epoch and of each part of it."""
    course = Course(len(corpus.names), batch_size, effort.stretch)
    trial = Course(len(corpus.names), batch_size, effort.stretch // 2)
    settings = fastest_settings(corpus, weights, trial, effort.settings)
    watches: dict[type[Program], Stopwatch] = {}
    peaks: list[float] = []
    calls: dict[str, Callable[[], None]] = {}
    for program_class in PROGRAMS:
        make = (
            partial(WithTorch, settings=settings) if program_class is WithTorch else program_class
        )
        calls[program_class.name], watches[program_class] = course.runner(make(corpus, weights))
    calls["peak"] = lambda: peaks.append(threads * momentary_rate())
    race(calls, effort.budget)

    peak = max(peaks)  # an interrupted probe reads too low
    texts = [ASCII.fold(name) for name in corpus.names]
    batches = course.order.split(batch_size)
    counts = count_batches([texts[index] for index in batch.tolist()] for batch in batches)
    rows = []
    for program_class, watch in watches.items():
        recorded = watch.recorded[1:]  # the first stretch is the warm-up
        row = {"threads": threads, "batch": batch_size, "program": program_class.name}
        row |= {"seconds": medians(recorded, len(corpus.names) / course.size)}
        row |= {"rounds": len(recorded), "peak": peak}
        row["floor"] = floor(counts, len(corpus.languages), True, program_class, peak)
        rows.append(row | ({"settings": str(settings)} if program_class is WithTorch else {}))
    return rows


def medians(recorded: Sequence[Mapping[str, float]], stretches: float) -> dict[str, float]:
    """Returns the median of each part, times the number of stretches in an epoch."""
    return {
        part: stretches * statistics.median(entry[part] for entry in recorded)
        for part in recorded[0]
    }
