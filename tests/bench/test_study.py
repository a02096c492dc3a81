"""Tests what the study of the names application computes from test scores."""

import json

import pytest
import torch

from benchmarks.names import page, study
from namernn_fast.names import load, split
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.tensor_files import write_tensors

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def found():
    """Returns figures for two splits, in which only the reference is always right."""
    parts = [split(embedded_sample(), seed=seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    scores = []
    for part in parts:
        shape = (len(part.test), len(part.languages))
        scores.append({name: torch.randn(shape, generator=generator) for name in page.SYSTEMS})
        scores[-1][page.UNUSUAL] = torch.arange(len(part.test)).float()  # all but two are unusual
        scores[-1][page.REFERENCE].scatter_(1, part.test.labels.unsqueeze(1), 9.0)
    seconds = [
        {page.REFERENCE: 100.0, page.DISTILLED: 20.0},
        {page.REFERENCE: 120.0, page.DISTILLED: 22.0},
    ]
    return json.loads(json.dumps(study.summary(study.Results(parts, scores, seconds))))


def test_the_study_reports_which_system_wins(found):
    reference = found["systems"][page.REFERENCE]
    assert reference["accuracy"] == reference["macro_f1"] == [1.0, 1.0]
    assert reference["seconds"] == [100.0, 120.0]
    for networks in found["tests"].values():
        ahead = page.verdict("it", "them", networks[page.REFERENCE])
        assert ahead.count(": ahead") == ahead.count("2 splits won") == 2
        assert ": ahead" not in page.verdict("it", "them", networks[page.PLAIN])


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.3, "ahead"), (-0.3, -0.1, "behind"), (-0.1, 0.3, "no significant difference")],
)
def test_a_verdict_needs_an_interval_without_zero(low, high, said):
    assert page.outcome({"low": low, "high": high}) == said


def test_a_split_is_trained_again_after_the_code_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "names", embedded_sample)
    written = tmp_path / "plain0.safetensors"
    write_tensors(written, study.KIND, {}, {"version": study.code_version()})
    assert study.is_finished(written, study.code_version())
    assert not study.is_finished(written, "another")
    assert not study.is_finished(tmp_path / "plain1.safetensors", study.code_version())


def test_unusual_names_are_counted(found):
    sizes = [names[2] for names in found["names"]]
    assert found["unusual"]["share"] == [1 - 2 / size for size in sizes]
    for share, right, others, accuracy in zip(
        *found["unusual"].values(), found["systems"][page.DISTILLED]["accuracy"], strict=True
    ):
        assert share * right + (1 - share) * others == pytest.approx(accuracy)
    assert page.unusual({"share": [0.02], "accuracy": [0.5], "others": [0.8]}) == (
        "**Unusual names.** 2.0 ± 0.0 % of the test names are unusual. The distilled network gets "
        "50.0 ± 0.0 % of them right, and 80.0 ± 0.0 % of the others."
    )


def test_wrong_answers_to_well_known_names_are_listed():
    asked = study.well_known_names(load())
    assert len(asked) == 60
    assert {row["language"] for row in asked} <= {*load().languages}
    table = page.well_known(
        [
            {"name": "A", "language": "Thai", "answer": "Thai", "probability": 0.9},
            {"name": "B", "language": "Thai", "answer": "Lao", "probability": 0.25},
        ]
    )
    assert "gets 1 of these 2 right" in table
    assert table.splitlines()[-1] == "- **Thai**: A, B (Lao 0.25)"
