"""Tests that unusual names and weak languages are measured, saved and marked in output."""

import dataclasses
import json
import math
from collections import Counter, defaultdict

import pytest
import torch

from namernn_fast import names
from namernn_fast.names import Folding, InputError, Predictor, Recipe, fit, load, save_checkpoint
from namernn_fast.names.checkpoint import KIND
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.distillation import distilled
from namernn_fast.names.encoding import encode_names
from namernn_fast.names.tensor_files import read_values
from namernn_fast.names.unusual import SHARE, fit_unusualness

PARTS = names.split(embedded_sample())
SMALL = Recipe(epochs=1, model={"embedding_size": 4, "hidden_size": 8})


@pytest.fixture(scope="module")
def checkpoint():
    """Returns a small trained network with recalls at and below the limit for weak languages."""
    found = fit(PARTS, SMALL).checkpoint
    recalls = {**dict.fromkeys(found.languages, 0.2), "Polish": 0.19, "Greek": None}
    found.info["metrics"]["test_recall"] = recalls
    return found


def defined_unusualness(parts):
    """Returns a function that computes the unusualness of a name without accents by definition."""
    mark = "$"
    symbols = len(Folding().alphabet) + 1

    def trigrams(text):
        marked = mark * 2 + text + mark
        return [marked[i : i + 3] for i in range(len(text) + 1)]

    texts = parts.folding.plain.fold_usable(parts.train.texts)
    labels = parts.train.labels.tolist()
    sizes = Counter(labels)
    weights = [sizes[label] ** -0.5 for label in labels]
    mean_weight = sum(weights) / len(weights)
    counts, of_context = defaultdict(float), defaultdict(float)
    for text, weight in zip(texts, weights, strict=True):
        for trigram in trigrams(text):
            for gram in (trigram, trigram[1:], trigram[2:]):
                counts[gram] += weight / mean_weight
                of_context[gram[:-1]] += weight / mean_weight

    def probability(gram):
        count, whole = counts[gram], of_context[gram[:-1]]
        if len(gram) == 1:
            return (count + 1) / (whole + symbols)
        return (count + 5 * probability(gram[1:])) / (whole + 5)

    validation = parts.folding.plain.fold_usable(parts.validation.texts)
    terms = [-math.log(probability(gram)) for text in validation for gram in trigrams(text)]
    mean = sum(terms) / len(terms)
    deviation = (sum((term - mean) ** 2 for term in terms) / len(terms)) ** 0.5

    def sum_of(text):
        found = [(-math.log(probability(gram)) - mean) / deviation for gram in trigrams(text)]
        return sum(found) / len(found) ** 0.5

    sums = torch.tensor([sum_of(text) for text in validation], dtype=torch.float64)
    limit = max(sums.quantile(1 - SHARE).item(), 1)
    return lambda text: sum_of(text) / limit


def test_unusualness_matches_its_documentation():
    """Covers a single character, accents, and a name longer than every training name."""
    longest = max(map(len, PARTS.train.texts))
    asked = ["Kim", "x", "Ślusàrski-Müller", "Straß", "a" * 200, "o'neal jr.", "Qwrtp"]
    asked.append(("an" * longest)[: longest + 1])
    defined = defined_unusualness(PARTS)
    expected = [defined(text) for text in PARTS.folding.plain.fold_usable(asked)]
    expected = [
        max(value, len(name) / longest) if len(name) > longest else value
        for name, value in zip(asked, expected, strict=True)
    ]
    found = fit_unusualness(PARTS).of(encode_names(asked, PARTS.folding), PARTS.folding)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_unusualness_does_not_depend_on_the_batch_size(monkeypatch):
    encoded = encode_names(PARTS.train.texts, PARTS.folding)
    measure = fit_unusualness(PARTS)
    whole = measure.of(encoded, PARTS.folding)
    monkeypatch.setattr("namernn_fast.names.unusual._NAMES_AT_ONCE", 7)
    torch.testing.assert_close(measure.of(encoded, PARTS.folding), whole)
    single = encode_names(PARTS.train.texts[:1], PARTS.folding)
    torch.testing.assert_close(measure.of(single, PARTS.folding), whole[:1])


def test_made_up_names_and_soft_labels_do_not_affect_unusualness(checkpoint):
    labels = torch.nn.functional.one_hot(PARTS.train.labels).float()
    soft = dataclasses.replace(PARTS, train=dataclasses.replace(PARTS.train, labels=labels))
    for taught in (soft, distilled(PARTS, checkpoint.model, 500)):
        assert torch.equal(fit_unusualness(taught).table, fit_unusualness(PARTS).table)


def test_few_real_names_are_unusual(real_folder):
    """The limit comes from the validation set, so about `SHARE` of the test names are unusual."""
    parts = names.split(names.read_names(real_folder))
    measure = fit_unusualness(parts)
    share = (measure.of(parts.validation.names, parts.folding) > 1).double().mean().item()
    assert share == pytest.approx(SHARE, abs=1 / len(parts.validation))
    unusual = measure.of(parts.test.names, parts.folding) > 1
    assert 0.01 < unusual.double().mean() < 0.03
    strange = ["a" * 200, "Mary Jane Watson", "qwrtpsdf", "Xyzzy", "'''", "hello world"]
    usual = ["García", "Silva", "Pereira", "Müller", "Al-Farsi", "Nguyen", "Rimsky-Korsakov"]
    found = measure.of(encode_names(strange + usual, parts.folding), parts.folding) > 1
    assert found.tolist() == [True] * len(strange) + [False] * len(usual)


def test_a_checkpoint_keeps_the_folding_and_the_trigrams(checkpoint, tmp_path):
    asked = ["Müller", "Al-Farsi", "Qwrtp"]
    for dtype, precision in ((torch.float32, 0), (torch.float16, 1e-2)):
        save_checkpoint(tmp_path / "new", checkpoint, dtype)
        loaded = load(tmp_path / "new")
        assert loaded.folding == PARTS.folding
        expected = Predictor(checkpoint).unusualness(asked)
        torch.testing.assert_close(loaded.unusualness(asked), expected, rtol=precision, atol=0)
        assert "unusual" not in loaded.info
    longest = max(map(len, PARTS.train.texts))
    kept = read_values(tmp_path / "new", KIND)["unusual"]
    assert kept == {"share": SHARE, "longest": longest}
    assert loaded.unusualness([]).shape == (0,)
    with pytest.raises(InputError, match="has no character that the model reads"):
        loaded.unusualness(["Kim", "李"])


def test_training_records_the_recall_of_each_language():
    trained = fit(PARTS, SMALL).checkpoint
    right = Predictor(trained).probabilities(PARTS.test.texts).argmax(1) == PARTS.test.labels
    for label, language in enumerate(PARTS.languages):
        recall = right[PARTS.test.labels == label].double().mean().item()
        assert trained.info["metrics"]["test_recall"][language] == pytest.approx(recall)


def test_predict_marks_unusual_names_and_weak_languages(checkpoint, tmp_path, run):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint)
    out, _ = run("predict", "--checkpoint", path, "Kim", "Qwrtpq", "--top", 18)
    kim, strange = out.split("Qwrtpq\n")
    assert "unusual" not in kim
    assert strange.endswith("  unusual: unlike the names that the model has learned from\n")
    for text in (kim, strange):
        assert [line.split()[1] for line in text.splitlines() if "(weak)" in line] == ["Polish"]
    out, _ = run("predict", "--checkpoint", path, "Kim", "Qwrtpq", "--format", "jsonl")
    assert [json.loads(line)["unusual"] for line in out.splitlines()] == [False, True]


def test_evaluate_marks_weak_languages(checkpoint, tmp_path, run):
    pytest.importorskip("sklearn")
    save_checkpoint(tmp_path / "model", checkpoint)
    out, _ = run("evaluate", "--checkpoint", tmp_path / "model", "--no-ngrams")
    right = Predictor(checkpoint).probabilities(PARTS.test.texts).argmax(1) == PARTS.test.labels
    for label, language in enumerate(PARTS.languages):
        weak = right[PARTS.test.labels == label].double().mean() < 0.2
        assert (f"{language} (weak)" in out) == weak
