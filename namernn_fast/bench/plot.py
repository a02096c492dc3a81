"""Plots of speed-ups against the batch size. Drawing needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .cells import BASELINE, FUSED, Cell
from .tables import TIMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can distinguish; markers are for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")

Medians = dict[str, float]
"""The median seconds per call of each layer."""
Timings = dict[Cell, Medians]


def speed_up(medians: Medians) -> float:
    """Returns how many times faster the fused layer is."""
    return medians[BASELINE] / medians[FUSED]


def draw(title: str, panels: Mapping[str, Mapping[str, Timings]], legend: str | None) -> Figure:
    """Draws speed-ups against the batch size.

    Args:
        title: The text after "Speed-up of FusedRNN over nn.RNN:" above the figure.
        panels: The panels by title, and in each panel the lines by label.
        legend: The title of the legend.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 3.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    cells = [cell for lines in panels.values() for line in lines.values() for cell in line]
    batches = sorted({cell.batch for cell in cells})
    for panel, (subtitle, lines) in zip(axes[0], panels.items(), strict=True):
        for (label, line), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
            points = {cell.batch: speed_up(medians) for cell, medians in line.items()}
            panel.plot([*points], [*points.values()], color=colour, marker=marker, label=label)
        panel.axhline(1, color="0.3", linewidth=1, linestyle="--")
        panel.set(title=subtitle, xlabel="batch size B (sequences)", xscale="log", yscale="log")
        panel.set_xticks(batches, labels=map(str, batches))
        panel.minorticks_off()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    first = axes[0, 0]
    # Start the axis below 1, so that a slow-down shows as one, and include a tick above 1.
    low, high = min(first.get_ylim()[0], 0.8), max(first.get_ylim()[1], 2.2)
    ticks = [2.0**power for power in range(-5, 8) if low <= 2.0**power <= high]
    first.set(ylim=(low, high), ylabel=f"{BASELINE} time / {FUSED} time")
    first.set_yticks(ticks, labels=[f"{tick:g}{TIMES}" for tick in ticks])
    figure.suptitle(f"Speed-up of {FUSED} over {BASELINE}: {title}")
    figure.legend(
        *first.get_legend_handles_labels(),
        title=legend,
        loc="outside right center",
        frameon=False,
    )
    return figure
