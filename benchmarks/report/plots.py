"""Saves plots reproducibly. Needs matplotlib."""

from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Saves and closes a figure."""
    # Without matplotlib's version in the file, equal figures have equal bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
