"""The README's table of capabilities is what `benchmarks/capabilities.py` finds."""

import pytest

from benchmarks.harness.grid import FUSED
from benchmarks.harness.paths import README
from benchmarks.report.capabilities import LAYERS, ROWS, cell


def published():
    """The verdicts in the README, by label."""
    text = README.read_text(encoding="utf-8")
    section = text.partition("<!-- capabilities: begin -->")[2]
    section = section.partition("<!-- capabilities: end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in section.strip().splitlines()[2:]]
    return {label: dict(zip(LAYERS, cells, strict=True)) for label, *cells in rows}


def test_every_row_is_published():
    assert [*published()] == [*ROWS]


@pytest.mark.parametrize(
    "label",
    [pytest.param(label, marks=[pytest.mark.slow] * row.slow) for label, row in ROWS.items()],
)
def test_capability(label):
    """Only yes and no are compared: the words of an error are those of a torch version."""
    found = cell(label, FUSED)
    assert found.split()[0] == published()[label][FUSED].split()[0], found
