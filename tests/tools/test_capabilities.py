"""Tests that the table in docs/capabilities.md matches the results of `tools/capabilities.py`."""

import pytest

from benchmarks.harness.paths import CAPABILITIES
from tools.capabilities import FUSED, NO, ROWS, STEPS, TORCH, YES, attempt, merged, note_of


def published():
    """Reads {row label: {layer class: verdict}} and {row label: note} from the page."""
    text = CAPABILITIES.read_text(encoding="utf-8")
    section = text.partition("<!-- capabilities: begin -->")[2]
    section = section.partition("<!-- capabilities: end -->")[0]
    rows = [line[2:-2].split(" | ") for line in section.splitlines() if "|" in line][2:]
    verdicts = {
        label: parsed(of_torch, TORCH) | parsed(ours, FUSED) for label, of_torch, ours, _ in rows
    }
    return verdicts, {label: note for label, *_, note in rows}


def parsed(cell, names):
    """Returns {layer class: verdict} from the text that `merged` returned for these classes."""
    if ": " not in cell:
        return dict.fromkeys(names, cell)
    parts = [part.split(": ") for part in cell.split("; ")]
    return {name: verdict for verdict, layers in parts for name in layers.split(", ")}


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


@pytest.mark.parametrize("verdicts", [(YES, YES, YES), (NO, YES, NO), (STEPS, NO, YES)])
def test_verdicts_survive_being_merged(verdicts):
    of_layers = dict(zip(TORCH, verdicts, strict=True))
    assert parsed(merged(of_layers), TORCH) == of_layers


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
