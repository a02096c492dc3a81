"""The table in docs/capabilities.md is what `tools/capabilities.py` finds."""

import pytest

from benchmarks.harness.grid import FUSED
from benchmarks.harness.paths import CAPABILITIES
from tools.capabilities import LAYERS, NO, ROWS, attempt


def published():
    """The cells of both layer classes on the page, by label."""
    text = CAPABILITIES.read_text(encoding="utf-8")
    section = text.partition("<!-- capabilities: begin -->")[2]
    section = section.partition("<!-- capabilities: end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line][2:]
    return {label: dict(zip(LAYERS, cells, strict=True)) for label, *cells in rows}


def test_every_row_is_published():
    assert [*published()] == [*ROWS]


def test_every_no_has_its_reason_in_words():
    for label, cells in published().items():
        for name, cell in cells.items():
            if cell.startswith(NO):
                assert cell == f"{NO} ({ROWS[label].why_not[name]})"


@pytest.mark.parametrize(
    "label",
    [pytest.param(label, marks=[pytest.mark.slow] * row.slow) for label, row in ROWS.items()],
)
def test_capability(label):
    """The layer does what the page says; the text of an error depends on torch's version."""
    verdict, text = attempt(label, FUSED)
    assert verdict == published()[label][FUSED].split()[0], text
