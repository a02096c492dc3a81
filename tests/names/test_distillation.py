"""Tests training on a teacher's predictions for training names and made-up names."""

import pytest
import torch

from namernn_fast.names import RECIPES, Recipe, distillation, encode_names, fit, split
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.prediction import logits

PARTS = split(embedded_sample())
SMALL = {"embedding_size": 8, "hidden_size": 12}


@pytest.fixture(scope="module")
def teacher():
    return fit(PARTS, Recipe(epochs=1, model=SMALL)).checkpoint.model


def test_made_up_names_use_only_trigrams_of_training_names():
    names, again, others = (
        distillation.made_up_names(PARTS, 3000, seed=seed) for seed in (0, 0, 1)
    )
    assert names == again != others
    assert len(names) == 3000
    assert {len(name) for name in names} <= {*range(1, 21)}
    marked = [f"^^{text}$" for text in PARTS.train.texts]
    known = {text[place : place + 3] for text in marked for place in range(len(text) - 2)}
    for name in names:
        whole = f"^^{name}$" if len(name) < 20 else f"^^{name}"
        assert {whole[i : i + 3] for i in range(len(whole) - 2)} <= known


def test_a_teacher_labels_the_training_set_and_made_up_names(teacher, monkeypatch):
    """Made-up names that are also in the validation or test set are excluded."""
    known = {*PARTS.train.texts}
    drawn = ["made up", "made up", PARTS.test.texts[0], PARTS.validation.texts[0]]
    monkeypatch.setattr(distillation, "made_up_names", lambda *_, **options: [*drawn, *known])
    lesson = distillation.distilled(PARTS, teacher, 300, prior_correction=0.3)
    assert sorted(lesson.train.texts) == sorted({*known, "made up"})
    scores = logits(teacher, encode_names(lesson.train.texts, PARTS.folding)).double()
    expected = (scores + 0.3 * PARTS.log_priors()).softmax(1).float()
    torch.testing.assert_close(lesson.train.labels, expected)
    assert lesson.validation is PARTS.validation
    assert lesson.info == {**PARTS.info, "made_up": 300}
    torch.testing.assert_close(lesson.priors(), lesson.train.labels.double().mean(0))


def test_a_student_learns_the_predictions_of_its_teacher(teacher):
    lesson = distillation.distilled(PARTS, teacher, 100)
    recipe = RECIPES["distilled"].changed(epochs=15, batch_size=32, model=SMALL)
    student = fit(lesson, recipe).checkpoint.model
    answers = [logits(model, lesson.train.names).argmax(1) for model in (teacher, student)]
    assert (answers[0] == answers[1]).float().mean() > 0.8
