"""Tests that the table in docs/capabilities.md matches what `tools/capabilities.py` finds."""

import pytest

from benchmarks.harness.paths import CAPABILITIES
from tools.capabilities import LAYERS, NO, ROWS, attempt


def published():
    """Returns {row label: {layer class: entry}} as the page shows them."""
    text = CAPABILITIES.read_text(encoding="utf-8")
    section = text.partition("<!-- capabilities: begin -->")[2]
    section = section.partition("<!-- capabilities: end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "|" in line][2:]
    return {label: dict(zip(LAYERS, entries, strict=True)) for label, *entries in rows}


def test_every_row_is_published_and_every_no_has_its_reason():
    assert [*published()] == [*ROWS]
    for label, entries in published().items():
        for name, entry in entries.items():
            if entry.startswith(NO):
                assert entry == f"{NO} ({ROWS[label].why_not[name]})"


@pytest.mark.covering(0)
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("Fused")])
@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[pytest.mark.slow] * ROWS[label].slow) for label in ROWS]
)
def test_layers_do_what_the_page_says(name, label):
    """Compares only yes or no, because the text of an error depends on torch's version."""
    verdict, text = attempt(label, name)
    assert verdict == published()[label][name].split()[0], text
