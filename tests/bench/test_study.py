"""Tests the statistics that the study of the names application computes from scores."""

import json

import pytest
import torch

from benchmarks.names import study
from benchmarks.names import study_report as page
from namernn_fast.names import RECIPES, load, split
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.prediction import logits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def found():
    """Returns results for two splits. Only the reference predicts every name correctly."""
    generator = torch.Generator().manual_seed(0)
    runs = []
    for seed in (0, 1):
        part = split(embedded_sample(), seed=seed)
        shape = (len(part.test), len(part.languages))
        scores = {name: torch.randn(shape, generator=generator) for name in page.SYSTEMS}
        scores[page.UNUSUAL] = torch.arange(len(part.test)).float()  # all but two are unusual
        scores[page.REFERENCE].scatter_(1, part.test.labels.unsqueeze(1), 9.0)
        runs.append(study.Run(part, scores, {page.REFERENCE: 100.0 + 20 * seed}))
    return json.loads(json.dumps(study.summary(runs)))


def test_every_system_scores_the_test_set_of_a_split(tmp_path, monkeypatch):
    recipes = {name: recipe.changed(epochs=1) for name, recipe in RECIPES.items()}
    recipes["reference"] = recipes["reference"].changed(members=2)
    monkeypatch.setattr(study, "RECIPES", recipes)
    monkeypatch.setattr(study, "MADE_UP", 100)
    monkeypatch.setattr(study, "names", embedded_sample)
    monkeypatch.setattr(study, "SHIPPED", tmp_path / "names.safetensors")
    parts, scores, seconds = study.run_split(0)
    assert scores.keys() == {*page.SYSTEMS, page.UNUSUAL}
    assert seconds.keys() == {page.NGRAM, page.WEIGHTED, page.PLAIN, page.REFERENCE, page.DISTILLED}
    bare = scores[page.NGRAM] + 0.3 * parts.log_priors()
    torch.testing.assert_close(scores[page.BARE], bare)
    shipped = load(study.SHIPPED).checkpoint.model
    torch.testing.assert_close(logits(shipped, parts.test.names), scores[page.DISTILLED])


def test_the_study_reports_which_system_wins(found):
    reference = found["systems"][page.REFERENCE]
    assert reference["accuracy"] == reference["macro_f1"] == [1.0, 1.0]
    assert reference["seconds"] == [100.0, 120.0]
    for networks in found["tests"].values():
        ahead = page.verdict("it", "them", networks[page.REFERENCE])
        assert ahead.count(": ahead") == ahead.count("2 splits won") == 2
        assert ": ahead" not in page.verdict("it", "them", networks[page.PLAIN])


def test_the_fraction_and_accuracy_of_unusual_names_are_reported(found):
    sizes = [names[2] for names in found["names"]]
    assert found["unusual"]["share"] == [1 - 2 / size for size in sizes]
    for share, right, others, accuracy in zip(
        *found["unusual"].values(), found["systems"][page.DISTILLED]["accuracy"], strict=True
    ):
        assert share * right + (1 - share) * others == pytest.approx(accuracy)


def test_the_model_knows_the_languages_of_well_known_names():
    asked = study.well_known_names(load())
    assert len(asked) == 60
    assert sum(row["answer"] == row["language"] for row in asked) >= 40
