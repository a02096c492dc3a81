"""Plots speed-ups against the batch size. Drawing needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .tables import TIMES
from .workloads import Layers, Workload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind readers can distinguish the colours of this palette (Okabe and Ito). Markers
# distinguish the lines in black-and-white print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

Medians = dict[str, float]
"""The median seconds per call of each layer."""
Timings = dict[Workload, Medians]
Points = dict[int, float]
"""Speed-ups by batch size."""

COLUMNS = 2
"""The maximum number of panels side by side."""


def speed_up(workload: Workload, medians: Medians) -> float:
    """Returns how many times faster the fused layer is than torch's layer on a workload."""
    return medians[workload.layers.baseline] / medians[workload.layers.fused]


def speed_ups(timings: Timings) -> list[float]:
    """Returns, for each workload, how many times faster the fused layer is than torch's layer."""
    return [speed_up(workload, medians) for workload, medians in timings.items()]


def draw(
    title: str,
    panels: Mapping[str, Mapping[str, Points]],
    legend: str | None,
    compared: Sequence[Layers],
) -> Figure:
    """Returns a figure of speed-ups against the batch size.

    Args:
        title: The text above the figure, after "Speed-up of FusedRNN over nn.RNN:" or, if there
            are several layers, "Speed-up over torch's layers:".
        panels: Maps the title of each panel to its lines, and the label of each line to its points.
        legend: The title of the legend beside the panels; None to draw a short legend without a
            title in the first panel.
        compared: The pairs of layers that the lines compare.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    beside = 0.6 if legend is None else 2.2
    figure = Figure(figsize=(beside + 3.6 * columns, 0.4 + 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    batches = sorted({b for lines in panels.values() for line in lines.values() for b in line})
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel, (subtitle, lines) in zip(axes.flat, panels.items(), strict=False):
        for (label, line), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
            panel.plot([*line], [*line.values()], color=colour, marker=marker, label=label)
        panel.axhline(1, color="0.3", linewidth=1, linestyle="--")
        panel.set(title=subtitle, xlabel="batch size B (sequences)", xscale="log", yscale="log")
        panel.set_xlim(batches[0] / 1.4, batches[-1] * 1.4)  # the same in all panels
        panel.set_xticks(batches, labels=map(str, batches))
        panel.minorticks_off()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    first = axes[0, 0]
    # Start the y-axis below 1, so that a slow-down is visible, and include a tick above 1.
    low, high = min(first.get_ylim()[0], 0.8), max(first.get_ylim()[1], 2.2)
    ticks = [2.0**power for power in range(-5, 8) if low <= 2.0**power <= high]
    first.set(ylim=(low, high))
    ratios = [f"{baseline} time / {fused} time" for baseline, fused in compared]
    for row in axes:
        row[0].set_ylabel(ratios[0] if len(ratios) == 1 else "time of torch's layer / fused layer")
    first.set_yticks(ticks, labels=[f"{tick:g}{TIMES}" for tick in ticks])
    pairs = [f"of {fused} over {baseline}" for baseline, fused in compared]
    names = pairs[0] if len(pairs) == 1 else "over torch's layers"
    figure.suptitle(f"Speed-up {names}: {title}")
    if legend is None:
        first.legend(loc="best", frameon=False)
    else:
        lines = first.get_legend_handles_labels()
        figure.legend(*lines, title=legend, loc="outside right center", frameon=False)
    return figure
