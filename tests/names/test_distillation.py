"""Networks that learn what others answer, on made-up names as well."""

import pytest
import torch

from namernn_fast.names import RECIPES, Recipe, encode_names, fit, split
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.distillation import distilled, made_up_names
from namernn_fast.names.prediction import logits

PARTS = split(embedded_sample())
SMALL = {"embedding_size": 8, "hidden_size": 12}


@pytest.fixture(scope="module")
def teacher():
    return fit(PARTS, Recipe(epochs=1, model=SMALL)).checkpoint.model


def test_made_up_names_come_from_the_training_part():
    names = made_up_names(PARTS, 500, seed=3)
    assert names == made_up_names(PARTS, 500, seed=3) != made_up_names(PARTS, 500, seed=4)
    assert len(names) == 500
    assert all(0 < len(name) <= 20 for name in names)
    marked = [f"^^{text}$" for text in PARTS.train.texts]
    known = {text[place : place + 3] for text in marked for place in range(len(text) - 2)}
    for name in names:
        whole = f"^^{name}$" if len(name) < 20 else f"^^{name}"
        assert {whole[i : i + 3] for i in range(len(whole) - 2)} <= known


def test_a_teacher_labels_the_training_part_and_made_up_names(teacher):
    lesson = distilled(PARTS, teacher, 300)
    texts = set(lesson.train.texts)
    assert len(texts) == len(lesson.train) > len(set(PARTS.train.texts))
    assert texts > set(PARTS.train.texts)
    assert texts.isdisjoint({*PARTS.validation.texts, *PARTS.test.texts})
    torch.testing.assert_close(
        lesson.train.labels, logits(teacher, encode_names(lesson.train.texts)).softmax(1)
    )
    assert lesson.validation is PARTS.validation
    assert lesson.info == {**PARTS.info, "made_up": 300}
    torch.testing.assert_close(lesson.priors(), lesson.train.labels.double().mean(0))


def test_a_student_learns_what_its_teacher_answers(teacher):
    lesson = distilled(PARTS, teacher, 100)
    recipe = RECIPES["distilled"].changed(epochs=15, batch_size=32, model=SMALL)
    student = fit(lesson, recipe).checkpoint.model
    answers = [logits(model, lesson.train.names).argmax(1) for model in (teacher, student)]
    assert (answers[0] == answers[1]).float().mean() > 0.8
