"""Files of plots, of which two runs with equal figures have equal bytes. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from namernn_fast.bench.plot import COLOURS, MARKERS, Medians, Timings, draw, speed_up

__all__ = ["COLOURS", "MARKERS", "Medians", "Timings", "save", "save_figure", "speed_up"]


def save(figure: Figure, path: Path) -> None:
    """Saves and closes a figure."""
    # Without the version of matplotlib in the file, equal figures have equal bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def save_figure(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Timings]], legend: str | None
) -> Path:
    """Saves one figure of speed-ups to `path`, with the arguments of `namernn_fast.bench.plot`."""
    save(draw(title, panels, legend), path)
    return path
