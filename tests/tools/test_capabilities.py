"""The table in docs/capabilities.md is what `tools/capabilities.py` finds."""

import pytest

from benchmarks.harness.paths import CAPABILITIES
from namernn_fast.bench.cells import LAYERS_OF
from tools.capabilities import LAYERS, NO, ROWS, attempt

# Rows that compile or export programs, which other tests do for every kind of cell.
SLOW_FOR_MOST = {
    "`torch.compile(fullgraph=True)`, forward and backward",
    "ONNX `RNN`, `GRU` or `LSTM` nodes, any length and batch (`dynamo=True`)",
    "one compilation for all lengths and batches, packed too",
    "`torch.compile` and `torch.export` of token ids, any number of them",
}


def published():
    """The cells of all layer classes on the page, by label."""
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


def test_rows_that_are_slow_for_most_layers_exist():
    assert ROWS.keys() >= SLOW_FOR_MOST


@pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(layers.fused, label, marks=[pytest.mark.slow] * is_slow)
        for kind, layers in LAYERS_OF.items()
        for label, row in ROWS.items()
        for is_slow in [row.slow or (kind != "rnn" and label in SLOW_FOR_MOST)]
    ],
)
def test_capability(name, label):
    """The layer does what the page says; the text of an error depends on torch's version."""
    verdict, text = attempt(label, name)
    assert verdict == published()[label][name].split()[0], text
