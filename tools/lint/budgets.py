"""Budgets: what a step of each case took when it was recorded, which it may not exceed."""

import json
from collections.abc import Iterator

from benchmarks.harness.paths import RESULTS
from tools.lint.counts import Counts
from tools.lint.events import Finding

RAW = RESULTS / "gpu_lint.json"
Recorded = dict[str, Counts]


def document(triton: str, counts: Recorded) -> dict:
    """Returns what is recorded: the version of the compiler, and by case what a step takes."""
    return {
        "triton": triton,
        "fields": Counts._fields,
        "counts": {name: list(of_case) for name, of_case in counts.items()},
    }


def load() -> tuple[str, Recorded]:
    """Returns the version of the compiler that the record was made with, and the counts by case."""
    if not RAW.exists():
        return "", {}
    kept = json.loads(RAW.read_text(encoding="utf-8"))
    fields = kept["fields"]
    return kept["triton"], {
        name: Counts(**dict(zip(fields, of_case, strict=True)))
        for name, of_case in kept["counts"].items()
    }


def exceeded(counts: Counts, recorded: Counts) -> Iterator[Finding]:
    """Yields every count that is larger than the recorded one."""
    for name, now, before in zip(Counts._fields, counts, recorded, strict=True):
        if now > before:
            what = name.replace("_", " ")
            yield Finding("budget", f"{now} {what} in a step, recorded were {before}")


def has_improved(counts: Counts, recorded: Counts) -> bool:
    """Returns whether any count is smaller than the recorded one."""
    return any(now < before for now, before in zip(counts, recorded, strict=True))
