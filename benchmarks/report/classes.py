"""Classes of workloads that a user recognises, with the mean speed-up of each layer."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.harness.grid import DENSE, MODES, PACKED, Workload
from namernn_fast.bench.plot import Timings, speed_up
from namernn_fast.bench.tables import ratio
from namernn_fast.bench.workloads import LAYERS_OF

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


def shared(timings: Timings) -> Timings:
    """Returns the workloads whose sizes were timed for every layer."""
    cells = {workload.cell for workload in timings}
    return {
        workload: medians
        for workload, medians in timings.items()
        if all(replace(workload, cell=cell) in timings for cell in cells)
    }


def class_rows(timings: Timings) -> Iterator[list[str]]:
    """Yields a row for each class, over the sizes that were timed for every layer.

    A column is one layer in one mode. An entry is the geometric mean of its speed-ups, followed by
    their number and the worst speed-up in brackets.
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
