"""The study of the names application: what it computes and tells from test scores."""

import json

import pytest
import torch

from benchmarks.names import page, study
from namernn_fast.names import split
from namernn_fast.names.dataset import embedded_sample

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def found():
    """The figures of two splits on which the reference is always right, the rest seldom."""
    parts = [split(embedded_sample(), seed=seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    scores = []
    for part in parts:
        shape = (len(part.test), len(part.languages))
        scores.append({name: torch.randn(shape, generator=generator) for name in page.SYSTEMS})
        scores[-1][page.REFERENCE].scatter_(1, part.test.labels.unsqueeze(1), 9.0)
    seconds = [{page.REFERENCE: 100.0, page.SMALL: 20.0}, {page.REFERENCE: 120.0, page.SMALL: 22.0}]
    return json.loads(json.dumps(study.summary(study.Results(parts, scores, seconds))))


def test_the_report_says_who_wins(found):
    report = page.report(found)
    [row] = [line for line in report.splitlines() if line.startswith(f"| {page.REFERENCE} ")]
    assert "100.0 ± 0.0" in row
    assert "1.000 ± 0.000" in row
    assert row.split("|")[-2].strip() == "110"
    for rival in page.RIVALS:
        [verdict] = [
            line
            for line in report.splitlines()
            if line.startswith(f"- **{page.REFERENCE}** against {rival}:")
        ]
        assert verdict.count(": ahead") == 2
        assert verdict.count("2 splits won") == 2
        [verdict] = [
            line
            for line in report.splitlines()
            if line.startswith(f"- **{page.PLAIN}** against {rival}:")
        ]
        assert ": ahead" not in verdict

    assert (
        "**Who wins.** The reference by the paired bootstrap: against n-grams, accuracy: ahead"
        in (report)
    )


def test_a_loss_is_told_as_well(found):
    tests = found["tests"][page.NGRAM][page.REFERENCE]
    for figure in tests.values():
        low, high = figure["bootstrap"]["low"], figure["bootstrap"]["high"]
        figure["bootstrap"] |= {"low": -high, "value": -figure["bootstrap"]["value"], "high": -low}
    assert page.verdict("ours", "theirs", tests).count(": behind") == 2


def test_the_model_card_has_the_figures_of_the_first_split(found):
    card = page.card(found, 2048)
    assert "(2 KiB, weights in 16 bits)" in card
    assert "which of 18 languages" in card
    assert found["splits"][0]["sha256"] in card
    small = found["systems"][page.SMALL]
    [row] = [line for line in card.splitlines() if line.startswith("| this network ")]
    assert f"{100 * small['accuracy'][0]:.1f}" in row
    assert "{" not in card
