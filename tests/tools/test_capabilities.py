"""Tests that the table in docs/capabilities.md matches the results of `tools/capabilities.py`."""

import pytest

from benchmarks.harness.paths import CAPABILITIES
from tools.capabilities import FUSED, LAYERS, NO, ROWS, STEPS, YES, attempt, note_of


def published():
    """Reads {row label: {layer class: verdict}} and {row label: note} from the page."""
    text = CAPABILITIES.read_text(encoding="utf-8")
    section = text.partition("<!-- capabilities: begin -->")[2]
    section = section.partition("<!-- capabilities: end -->")[0]
    rows = [line[2:-2].split(" | ") for line in section.splitlines() if "|" in line][2:]
    verdicts = {label: dict(zip(LAYERS, cells, strict=True)) for label, *cells, _ in rows}
    return verdicts, {label: note for label, *_, note in rows}


def test_the_page_has_every_row_and_a_reason_for_every_no():
    verdicts, notes = published()
    assert [*verdicts] == [*ROWS]
    for label, of_layers in verdicts.items():
        for name, verdict in of_layers.items():
            if verdict == NO:
                reason = ROWS[label].why_not[name]
                assert reason
                assert reason in notes[label]


@pytest.mark.parametrize(
    ("entries", "note"),
    [
        ({"nn.GRU": (YES, ""), "FusedGRU": (STEPS, "")}, ""),
        ({"nn.RNN": (NO, "why"), "nn.GRU": (NO, "why"), "FusedRNN": (YES, "")}, "why"),
        (
            {"nn.RNN": (NO, "why"), "nn.GRU": (NO, "why"), "FusedRNN": (YES, "slower")},
            "nn.RNN, nn.GRU: why; FusedRNN: slower",
        ),
    ],
)
def test_notes_name_their_layers_if_a_row_has_several_notes(entries, note):
    assert note_of(entries) == note


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[pytest.mark.slow] * ROWS[label].slow) for label in ROWS]
)
def test_layers_behave_as_the_capabilities_page_says(name, label):
    """Only verdicts are compared, because error messages depend on torch's version."""
    verdict, text = attempt(label, name)
    verdicts, _ = published()
    assert verdict == verdicts[label][name], text
