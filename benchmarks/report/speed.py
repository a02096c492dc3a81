"""Summarizes the grid's results in texts and plots, for the README and the performance page.

`benchmarks/cpu/grid.py` writes these texts and plots after a run.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.harness.grid import (
    DENSE,
    FORWARD,
    MODES,
    PACKED,
    PACKED_SHAPE,
    TRAINING,
    Workload,
    shape,
)
from benchmarks.harness.paths import PERFORMANCE_TABLES, RESULTS, ROOT
from benchmarks.harness.study import AGAIN, machine
from benchmarks.report.plots import save
from namernn_fast.bench import plot
from namernn_fast.bench.plot import Timings, speed_up, speed_ups
from namernn_fast.bench.tables import markdown, ratio
from namernn_fast.bench.workloads import LAYERS_OF

Document = dict[str, Any]

OVERVIEW = "overview"
"""The name of the plot in the README."""

CLASSES: dict[str, Callable[[Workload], bool]] = {
    "B = 1, T of 16 or fewer": lambda w: w.family == DENSE and w.batch == 1 and w.seq_len <= 16,
    "B = 1, T of 64 or more": lambda w: w.family == DENSE and w.batch == 1 and w.seq_len >= 64,
    "B of 8 to 64, H of 256 or fewer": (
        lambda w: w.family == DENSE and 8 <= w.batch <= 64 and w.hidden_size <= 256
    ),
    "B of 32 or more, H of 512 or more": (
        lambda w: w.family == DENSE and w.batch >= 32 and w.hidden_size >= 512
    ),
    "packed": lambda w: w.family == PACKED,
    "all of these sizes": lambda w: True,
}
"""Classes of workloads that a user recognises."""


def timings_of(document: Document, run: str = "rows") -> Timings:
    """Returns the median seconds per call of each layer, by workload.

    `run` is the key of the rows in the document.
    """
    return {Workload.of(row): row["medians"] for row in document[run]}


def select(timings: Timings, **wanted: object) -> Timings:
    """Returns the timings of workloads with the wanted attributes."""
    return {
        workload: medians
        for workload, medians in timings.items()
        if all(getattr(workload, name) == value for name, value in wanted.items())
    }


def by_cell(timings: Timings) -> dict[str, Timings]:
    """Groups the workloads by cell, for the cells that were timed."""
    return {cell: found for cell in LAYERS_OF if (found := select(timings, cell=cell))}


def shared(timings: Timings) -> Timings:
    """Returns the workloads with sizes that were timed for every layer."""
    cells = {workload.cell for workload in timings}
    return {
        workload: medians
        for workload, medians in timings.items()
        if all(replace(workload, cell=cell) in timings for cell in cells)
    }


def class_rows(timings: Timings) -> Iterator[list[str]]:
    """Yields a table row for each class of workload, over the sizes timed for every layer.

    A column is one layer in one mode. An entry is the geometric mean of the speed-ups, followed by
    the number of speed-ups and the worst speed-up in brackets.
    """
    cells = dict.fromkeys(workload.cell for workload in timings)
    kinds = [*itertools.product(cells, MODES)]
    yield ["class", *(f"{LAYERS_OF[cell].fused}, {mode}" for cell, mode in kinds)]
    comparable = shared(timings)
    for name, belongs in CLASSES.items():
        ratios: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
        for workload, medians in comparable.items():
            if belongs(workload):
                ratios[workload.cell, workload.mode].append(speed_up(workload, medians))
        yield [name, *map(_mean, ratios.values())]


def _mean(ratios: list[float]) -> str:
    if not ratios:
        return ""
    mean, worst = statistics.geometric_mean(ratios), min(ratios)
    return f"{ratio(mean)} ({len(ratios)}, worst {ratio(worst)})"


def classes(document: Document) -> str:
    """Returns the speed-ups of a run by class of workload, with all layers side by side."""
    return (
        f"{machine(document)}; FusedRNN on `{document['path']}`; float32. Each layer is compared "
        "with torch's own: geometric means of the speed-ups over the sizes that were timed for "
        "every layer, with the number of sizes and the worst speed-up."
        f"\n\n{markdown(class_rows(timings_of(document)))}"
    )


def summary(document: Document) -> str:
    """Returns the README's sentence: the mean and the worst speed-up of each layer and mode."""
    timings = timings_of(document)
    layers = []
    for cell_timings in by_cell(timings).values():
        parts = []
        for name, mode in (("inference", FORWARD), ("training", TRAINING)):
            if ratios := speed_ups(select(cell_timings, mode=mode)):
                mean, worst = ratio(statistics.geometric_mean(ratios)), ratio(min(ratios))
                parts.append(f"{mean} in {name} (worst {worst})")
        baseline = next(iter(cell_timings)).layers.baseline
        layers.append(f"over `{baseline}`: {' and '.join(parts)}")
    tables = PERFORMANCE_TABLES.relative_to(ROOT).as_posix()
    return (
        f"Geometric means of the speed-ups {'; '.join(layers)}. The {len(timings)} workloads of "
        f"[the tables]({tables}) and of the plot were measured on {document['cpu']} "
        f"(`{document['path']}`) with {document['threads'][-1]} threads, in float32."
        f"{repeatability(document)}"
    )


def repeatability(document: Document) -> str:
    """Returns how much the speed-ups of a second run differ, or "" if there was only one run."""
    if AGAIN not in document:
        return ""
    first, second = timings_of(document), timings_of(document, AGAIN)
    pairs = {w: (speed_up(w, first[w]), speed_up(w, medians)) for w, medians in second.items()}
    of_layers: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for workload, pair in pairs.items():
        if workload.mode in MODES:
            of_layers.setdefault((workload.cell, workload.mode), []).append(pair)
    runs = (zip(*each, strict=True) for each in of_layers.values())
    means = (list(map(statistics.geometric_mean, run)) for run in runs)
    single = [_percent(pair) for pair in pairs.values()]
    most = max(map(_percent, means))
    typical, largest = statistics.median(single), max(single)
    return (
        f" In a second run, the means differed by at most {most:.0f} %, and the speed-ups of "
        f"single workloads typically by {typical:.0f} % (at most {largest:.0f} %)."
    )


def _percent(pair: Sequence[float]) -> float:
    """Returns the difference of two positive values, in percent of the smaller one."""
    return 100 * (max(pair) / min(pair) - 1)


def summary_and_plot(document: Document) -> str:
    """Returns the section of the README."""
    place = plot_path(RESULTS, OVERVIEW).relative_to(ROOT).as_posix()
    return f"![Speed-up against batch size, {OVERVIEW}]({place})\n\n{summary(document)}"


def plot_path(folder: Path, name: str) -> Path:
    """Returns the path of a plot: the overview, or the plot of a family of workloads."""
    return folder / f"speedup_{name}.png"


def draw(document: Document, folder: Path) -> list[Path]:
    """Draws the speed-up against the batch size; returns the files.

    The overview has a panel for each mode and a line for each layer. Its points are geometric means
    over the dense sizes that were timed for all layers. The dense figure has a panel for each layer
    and mode, and the packed figure has a panel for each layer and shape.
    """
    pyplot.switch_backend("Agg")
    timings = timings_of(document)
    dense, packed = select(timings, family=DENSE), select(timings, family=PACKED)
    names = {cell: LAYERS_OF[cell].fused for cell in by_cell(timings)}
    overview = {
        mode: {
            fused: mean_points(select(shared(dense), cell=cell, mode=mode))
            for cell, fused in names.items()
        }
        for mode in MODES
    }
    dense_panels = {
        f"{fused}:\n{mode}": lines(select(dense, cell=cell, mode=mode), shape)
        for cell, fused in names.items()
        for mode in MODES
    }
    size, hidden = PACKED_SHAPE
    packed_panels = {
        f"{fused}:\nD = {size} inputs, H = {hidden} hidden units": lines(
            select(packed, cell=cell), attrgetter("mode")
        )
        for cell, fused in names.items()
    }
    sizes = "(D, H, T):\ninput size,\nhidden size,\nsequence length"
    compared = [LAYERS_OF[cell] for cell in names]
    paths = []
    for name, text, panels, legend, is_drawn in (
        (OVERVIEW, "dense input, mean of sizes", overview, None, dense),
        (DENSE, "dense input", dense_panels, sizes, dense),
        (PACKED, "packed input", packed_panels, None, packed),
    ):
        if is_drawn:
            paths.append(plot_path(folder, name))
            save(plot.draw(text, panels, legend, compared), paths[-1])
    return paths


def lines(timings: Timings, label: Callable[[Workload], str]) -> dict[str, plot.Points]:
    """Returns a line of speed-ups by batch size for each label."""
    found: dict[str, plot.Points] = {}
    for workload, medians in timings.items():
        found.setdefault(label(workload), {})[workload.batch] = speed_up(workload, medians)
    return found


def mean_points(timings: Timings) -> plot.Points:
    """Returns the geometric mean of the speed-ups at each batch size."""
    return {
        batch: statistics.geometric_mean(speed_ups(select(timings, batch=batch)))
        for batch in sorted({workload.batch for workload in timings})
    }
