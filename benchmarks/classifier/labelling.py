"""Races programs that tell the languages of names: from strings to labels, folding included."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.classifier.program import Corpus, Program
from benchmarks.classifier.work import count, floor
from benchmarks.harness.machine import momentary_rate
from namernn_fast.bench.race import Rounds, TimeBudget, race, timed
from namernn_fast.names import fold


def race_labels(
    programs: Mapping[type[Program], Program],
    corpus: Corpus,
    names: Sequence[str],
    threads: int,
    budget: TimeBudget | None,
) -> list[dict[str, Any]]:
    """Returns a row for each program, with the seconds that all names take.

    Args:
        programs: by their class; they have the same weights.
        corpus: which has the languages.
        names: as text.
        threads: the number of threads, which torch has been set to.
        budget: of the race; None lets each program read the names once. A great many names take
            so long that no warming up is needed, and a drift of the machine evens out.
    """
    peaks: list[float] = []
    calls: dict[str, Callable[[], object]] = {
        kind.name: partial(program.label, names) for kind, program in programs.items()
    }
    calls["peak"] = lambda: peaks.append(threads * momentary_rate())
    if budget is None:
        rounds = {name: Rounds(1, (timed(call),)) for name, call in calls.items()}
    else:
        rounds = race(calls, budget)
    peak = max(peaks)  # a probe that the system interrupts reads too low
    counts = count([fold(name) for name in names])
    rows = []
    for kind in programs:
        row = {"threads": threads, "names": len(names), "program": kind.name}
        row |= {"prefixes": counts.prefixes, "characters": counts.characters}
        row["seconds"] = statistics.median(rounds[kind.name].seconds)
        row |= {"rounds": len(rounds[kind.name].seconds), "peak": peak}
        row["floor"] = floor(counts, len(corpus.languages), False, kind, peak)
        rows.append(row)
    return rows
