"""Races programs that predict languages: from strings to labels, including folding."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.classifier.program import Corpus, Program
from benchmarks.classifier.work import count, floor
from benchmarks.harness.machine import momentary_rate
from namernn_fast.bench.race import Rounds, TimeBudget, race, timed
from namernn_fast.names import ASCII


def race_labels(
    programs: Mapping[type[Program], Program],
    corpus: Corpus,
    names: Sequence[str],
    threads: int,
    budget: TimeBudget | None,
) -> list[dict[str, Any]]:
    """Returns a row for each program, with the seconds for all names.

    Args:
        programs: Programs by their class, with the same weights.
        corpus: The corpus with the languages.
        names: The names as text.
        threads: The number of threads that torch is set to.
        budget: The budget of the race; with None each program reads the names once, because many
            names take so long that no warm-up is needed and drift evens out.
    """
    peaks: list[float] = []
    calls: dict[str, Callable[[], object]] = {
        program_class.name: partial(program.label, names)
        for program_class, program in programs.items()
    }
    calls["peak"] = lambda: peaks.append(threads * momentary_rate())
    if budget is None:
        rounds = {name: Rounds(1, (timed(call),)) for name, call in calls.items()}
    else:
        rounds = race(calls, budget)
    peak = max(peaks)  # an interrupted probe reads too low
    counts = count([ASCII.fold(name) for name in names])
    rows = []
    for program_class in programs:
        row = {"threads": threads, "names": len(names), "program": program_class.name}
        row |= {"prefixes": counts.prefixes, "characters": counts.characters}
        row["seconds"] = statistics.median(rounds[program_class.name].seconds)
        row |= {"rounds": len(rounds[program_class.name].seconds), "peak": peak}
        row["floor"] = floor(counts, len(corpus.languages), False, program_class, peak)
        rows.append(row)
    return rows
