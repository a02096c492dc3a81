"""The classes of cells that a user recognises: geometric means of the speed-up of each layer."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.harness.grid import DENSE, MODES, PACKED, Cell
from namernn_fast.bench.cells import LAYERS_OF
from namernn_fast.bench.plot import Timings, speed_ups
from namernn_fast.bench.tables import ratio

CLASSES: dict[str, Callable[[Cell], bool]] = {
    "B = 1, T of 16 or fewer": lambda c: c.family == DENSE and c.batch == 1 and c.seq_len <= 16,
    "B = 1, T of 64 or more": lambda c: c.family == DENSE and c.batch == 1 and c.seq_len >= 64,
    "B of 8 to 64, H of 256 or fewer": (
        lambda c: c.family == DENSE and 8 <= c.batch <= 64 and c.hidden_size <= 256
    ),
    "B of 32 or more, H of 512 or more": (
        lambda c: c.family == DENSE and c.batch >= 32 and c.hidden_size >= 512
    ),
    "packed": lambda c: c.family == PACKED,
    "all of these sizes": lambda c: True,
}


def shared(timings: Timings) -> Timings:
    """Returns the cells whose size was timed for every kind of layer."""
    kinds = {cell.kind for cell in timings}
    return {
        cell: medians
        for cell, medians in timings.items()
        if all(replace(cell, kind=kind) in timings for kind in kinds)
    }


def class_rows(timings: Timings) -> Iterator[list[str]]:
    """Yields a row for each class, over the sizes that were timed for every kind of layer.

    A column has the geometric mean of the speed-up of one layer in one mode and, in brackets, the
    number of cells and the worst of them.
    """
    kinds = dict.fromkeys(cell.kind for cell in timings)
    yield ["class", *(f"{LAYERS_OF[kind].fused}, {mode}" for kind in kinds for mode in MODES)]
    comparable = shared(timings)
    for name, belongs in CLASSES.items():
        row = [name]
        for kind in kinds:
            for mode in MODES:
                chosen = {
                    cell: medians
                    for cell, medians in comparable.items()
                    if (cell.kind, cell.mode) == (kind, mode) and belongs(cell)
                }
                row.append(_mean(speed_ups(chosen)))
        yield row


def _mean(ratios: list[float]) -> str:
    """Returns the geometric mean, the number and the worst of some speed-ups."""
    if not ratios:
        return ""
    mean, worst = statistics.geometric_mean(ratios), min(ratios)
    return f"{ratio(mean)} ({len(ratios)}, worst {ratio(worst)})"
