"""Times pretrained models of other packages: `python -m benchmarks.cases [--record]`.

Each model loads its weights from its package's wheel, except those of EasyOCR and TiRex-2, which
are random, and reads inputs in the package's shapes. It runs with torch's, fused and prepared
recurrent layers. TiRex-2, whose sLSTM torch lacks, runs with its own loop and with `slstm()`.
Models that run step by step also run with streams, and models with a supported layer also run with
8-bit weights. Results are checked before these variants are timed in alternation. Needs
`pip install "namernn_fast[cases]"`; unpacks to `build/cases`.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.cases import audio, pages, series, text
from benchmarks.cases.case import (
    COMPILED,
    FUSED,
    INT8,
    PREPARED,
    QUANTIZED,
    RANDOM,
    ROUNDED,
    STREAM,
    TORCH,
    Case,
    Package,
)
from benchmarks.cases.packages import unpack, version_of
from benchmarks.harness import columns
from benchmarks.harness import pages as harness
from benchmarks.harness.columns import Column, Row, Rows, label
from benchmarks.harness.paths import PERFORMANCE, REAL_MODELS, Section
from benchmarks.harness.study import Document, Study, machine, statistics_of
from namernn_fast.bench.race import TimeBudget, race
from namernn_fast.bench.tables import duration, markdown, ratio

PACKAGES = (
    Package("Resemblyzer", "Apache", audio.resemblyzer),
    Package("silero-vad", "MIT", audio.silero_vad),
    Package("BeatNet", "CC BY", audio.beatnet),
    Package("g2p_en", "Apache", text.g2p_en),
    Package("g2pM", "Apache", text.g2pm),
    Package("medaka", "ONT", text.medaka),
    Package("kraken", "Apache", pages.kraken),
    Package("EasyOCR", RANDOM, pages.easyocr),
    Package("tirex-2", RANDOM, series.tirex, is_installed=True),
)


class Models(Study):
    """Times each model on one thread and on the given number of threads."""

    def run(self, options: argparse.Namespace, wrong: list[str]) -> Rows:
        """Times the models; returns rows for each number of threads, and adds errors to `wrong`.

        Raises:
            SystemExit: a wheel is missing in a recorded run.
        """
        rows: Rows = []
        budget = harness.time_budget(options, self.max_rounds, self.round_seconds)
        for package in self.cases:
            find = version_of if package.is_installed else unpack
            if (version := find(package.name)) is None:
                message = f"{package.name}: left out, because its wheel was not found"
                if options.record:
                    raise SystemExit(message)
                print(message)
                continue
            for case in package.cases():
                print(f"{package.name}, {case.name}: checking and timing", flush=True)
                with harness.gated(f"{package.name}, {case.name}", wrong):
                    about = {"package": f"{package.name} {version}", "licence": package.licence}
                    rows += [about | row for row in times(case, {1, options.threads}, budget)]
                    print(f"  {line(rows[-1])}", flush=True)
        return rows


def times(case: Case, threads: set[int], budget: TimeBudget) -> Rows:
    """Times a case; returns a row for each number of threads.

    Raises:
        BudgetError: the results differ.
    """
    rows: Rows = []
    calls = case.calls()
    about: Row = {"name": case.name, "layer": case.layer, "shape": case.shape}
    with torch.inference_mode():
        about["changed"] = case.changed(calls)
        about["errors"] = case.errors(calls)
        for count in sorted(threads):
            harness.settle(count)
            share = statistics.median(case.share() for _ in range(5))
            found = statistics_of(race(calls, budget), TORCH)
            rows.append({**about, "threads": count, "share": share, **found})
    return rows


def line(row: Row) -> str:
    """Returns a row as text: the time with torch's layers, and the speed-ups over it."""
    gains = (f"{name} {ratio(1 / paired)}" for name, paired in row["paired"].items())
    time = duration(row["medians"][TORCH])
    return ", ".join([f"{label('threads', row['threads'])}: {TORCH} {time}", *gains])


def speed_up(name: str) -> Column:
    """Returns a column with the speed-up of a call over torch's layers."""
    return columns.speed_up(name, lambda r: 1 / r["paired"][name] if name in r["paired"] else None)


def interval(row: Row) -> str:
    """Returns the 95 % confidence interval of the fused layers' speed-up."""
    low, high = row["spread"][FUSED]
    return f"{1 / high:.2f} to {1 / low:.2f}"


def changed(row: Row) -> str:
    """Returns how many decisions differ from torch's layer, with float32 and with 8-bit weights."""
    counts = dict(row["changed"])
    if not counts:
        return ""
    decisions = counts.pop("of")
    rounded = [f", {name} {counts.pop(name)}" for name in ROUNDED if name in counts]
    return f"{max(counts.values())}{''.join(rounded)} of {decisions:,}"


def errors(row: Row) -> str:
    """Returns the relative errors of scores with 8-bit weights."""
    return ", ".join(f"{name} {error:.2%}" for name, error in row.get("errors", {}).items())


COLUMNS = (
    columns.key("package", "package"),
    columns.key("task", "name"),
    columns.key("layer", "layer"),
    columns.key("input", "shape"),
    columns.time(TORCH),
    columns.text("in the layer", lambda row: f"{row['share']:.0%}"),
    speed_up(FUSED),
    columns.text("95 %", interval),
    *map(speed_up, (PREPARED, STREAM, INT8, QUANTIZED, COMPILED)),
    columns.text("changed", changed),
    columns.text("error", errors),
)


def caption(document: Document) -> str:
    """Explains the columns, and lists the licences of the packages."""
    rows = document["rows"]
    licences = dict.fromkeys(f"{row['package']} ({row['licence']})" for row in rows)
    parts = [
        "float32, inference. `torch` is the time with torch's layers, and `in the layer` is their "
        "share of it. The other columns are speed-ups: medians of the ratios of neighbouring "
        "rounds. 95 % is the confidence interval of the ratio of the medians. `changed` counts the "
        "decisions (labels, phonemes, yes or no) that differ: in float32, and in 8 bits if that "
        "rounds a layer."
    ]
    if any("errors" in row for row in rows):
        parts.append(
            "`error` is the root mean square of the differences of scores in 8 bits from torch's "
            "float32, relative to the root mean square of the scores."
        )
    if any(QUANTIZED in row["medians"] for row in rows):
        parts.append(
            "`quantize_dynamic` is torch's function, which the package calls by default. It also "
            "rounds the linear layers, and is timed on the faster of two engines."
        )
    if any(COMPILED in row["medians"] for row in rows):
        parts.append(
            "For TiRex-2, `torch` is the package's own loop in Python, and `compiled` is the same "
            "forecast under `torch.compile`."
        )
    parts.append(f"Weights: {', '.join(licences)}.")
    return " ".join(parts)


def summary(document: Document) -> str:
    """Returns the table of mean speed-ups for docs/performance.md, with a line for each package."""
    most = document["threads"][-1]
    packages: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        found = packages.setdefault(row["package"], {"tasks": {}})
        found["tasks"][row["name"], row["layer"]] = None
        for name, value in row["paired"].items():
            found.setdefault((name, row["threads"]), []).append(1 / value)
    wanted = [(name, 1) for name in (FUSED, PREPARED, STREAM, INT8)] + [(FUSED, most)]
    lines = [["package", "tasks", *(f"{name}, {label('threads', n)}" for name, n in wanted)]]
    for package, found in packages.items():
        means = (statistics.geometric_mean(found[key]) if key in found else 0 for key in wanted)
        entries = (ratio(mean) if mean else "" for mean in means)
        lines.append([package, str(len(found["tasks"])), *entries])
    return (
        f"{machine(document)}; float32, inference. Geometric means of the speed-ups over torch's "
        f"layers, where each kind of layer was timed.\n\n{markdown(lines)}"
    )


STUDY = Models(
    name="cases",
    description=__doc__,
    cases=PACKAGES,
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=caption,
    by=("threads",),
    ours=TORCH,
    seconds=1.0,
    max_rounds=30,
    page=REAL_MODELS,
    more=(Section(PERFORMANCE, "models", summary),),
)


if __name__ == "__main__":
    STUDY.main()
