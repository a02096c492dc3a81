"""Tests `names evaluate`: metrics, intervals, significance tests, baselines and figures."""

import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("sklearn", reason="the extra 'evaluate' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'evaluate' is not installed")

from matplotlib import image
from scipy import stats

from namernn_fast.names import ASCII, baselines, evaluation, figures, significance
from namernn_fast.names.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from namernn_fast.names.dataset import NamesData, embedded_sample, read_names
from namernn_fast.names.model import NameClassifier, NameEnsemble
from namernn_fast.names.prediction import logits
from namernn_fast.names.significance import LabelledPredictions
from namernn_fast.names.splitting import split
from namernn_fast.names.training import Epoch, read_epochs

PARTS = split(embedded_sample(), seed=3, folding=ASCII)
EPOCH = dataclasses.asdict(Epoch(1, 1, 2.0, 0.2, 2.1, 0.1, 1.0))


@pytest.fixture(scope="module")
def by_hand():
    """Return an evaluation of five names in four languages.

    Language C is never predicted. Language D has no names, but is predicted once.
    """
    probabilities = [
        [0.7, 0.1, 0.1, 0.1],  # correct
        [0.5, 0.3, 0.1, 0.1],  # correct
        [0.2, 0.15, 0.1, 0.55],  # the correct language, B, ranks third
        [0.1, 0.7, 0.1, 0.1],  # correct
        [0.4, 0.3, 0.1, 0.2],  # the correct language, C, ranks fourth
    ]
    labels = [0, 0, 1, 1, 2]
    return evaluation.evaluate(labels, torch.tensor(probabilities).log(), "ABCD")


def test_accuracy_and_f1_match_hand_computed_values(by_hand):
    assert (by_hand.names, by_hand.accuracy.hits, by_hand.accuracy.value) == (5, 3, 0.6)
    # Wilson's interval for 3 hits out of 5.
    ends = (by_hand.accuracy.low, by_hand.accuracy.high)
    assert ends == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert (by_hand.top3.hits, by_hand.top3.value) == (4, 0.8)
    assert by_hand.confusion == ((2, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0))
    # F1 is 2*2/(2+3) for A, 2*1/(2+1) for B and 0 for C. D has no names, so it does not count.
    assert by_hand.macro_f1.value == pytest.approx((0.8 + 2 / 3 + 0) / 3)


def test_scores_per_language_match_hand_computed_values(by_hand):
    shares = [(scores.precision, scores.recall) for scores in by_hand.languages]
    values = [tuple(share and share.value for share in pair) for pair in shares]
    assert values == [(2 / 3, 1), (1, 0.5), (None, 0), (0, None)]
    counts = [(scores.names, scores.predicted) for scores in by_hand.languages]
    assert counts == [(2, 3), (2, 1), (1, 0), (0, 1)]
    assert [scores.f1 for scores in by_hand.languages] == pytest.approx([0.8, 2 / 3, 0, 0])


def test_probability_scores_match_hand_computed_values(by_hand):
    log_loss = -sum(map(math.log, (0.7, 0.5, 0.15, 0.7, 0.1))) / 5
    assert by_hand.log_loss == pytest.approx(log_loss)
    brier = (
        0.12 + (0.25 + 0.11) + (0.3025 + 0.7225 + 0.04 + 0.01) + 0.12 + (0.16 + 0.09 + 0.81 + 0.04)
    )
    assert by_hand.brier == pytest.approx(brier / 5)
    # The confidences are 0.4 (wrong), 0.5 (correct), 0.55 (wrong) and twice 0.7 (correct).
    assert by_hand.calibration_error == pytest.approx((0.4 + 0.5 + 0.55 + 2 * 0.3) / 5)
    filled = [bin for bin in by_hand.calibration if bin.names]
    assert [bin.names for bin in filled] == [1, 1, 1, 2]
    assert all(bin.low < bin.confidence + 1e-6 <= bin.high + 2e-6 for bin in filled)


@pytest.mark.parametrize(
    ("labels", "accuracy", "errors"), [([0, 1, 1], 1, (0, 0, 0)), ([1, 0, 0], 0, (1e6, 2, 1))]
)
def test_predictions_with_probability_1_have_extreme_scores(labels, accuracy, errors):
    """The logits give probabilities of exactly 1, which must be counted in the last bin."""
    found = evaluation.evaluate(labels, torch.eye(2)[[0, 1, 1]] * 1e6, "AB")
    assert found.accuracy.value == found.macro_f1.value == accuracy
    assert (found.log_loss, found.brier, found.calibration_error) == errors
    assert found.calibration[-1].names == 3


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        ([], torch.empty(0, 2)),
        ([0], torch.zeros(2, 2)),
        ([0, 1], torch.zeros(2, 3)),
        ([0, 1], torch.zeros(2)),
        ([0, 1], [[0.0, math.nan], [0, 0]]),
        ([0, 1], [[0.0, -math.inf], [0, 0]]),
    ],
)
def test_invalid_scores_are_rejected(labels, scores):
    with pytest.raises(ValueError, match=r"do not match scores|must be finite"):
        evaluation.evaluate(labels, scores, "AB")


def test_best_hits_counts_the_most_common_label_per_text():
    texts, labels = ["a", "a", "a", "b", "b", "c"], [0, 0, 1, 1, 2, 2]
    assert evaluation.best_hits(texts, labels) == 2 + 1 + 1


def drawn_predictions(count=400, classes=4, right=0.8, seed=0):
    """Return random labels, and predictions that are correct with probability `right`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    hits = torch.rand(count, generator=generator) < right
    return labels, torch.where(hits, labels, (labels + 1) % classes)


def test_mcnemar_matches_a_hand_computed_value():
    labels = [0] * 10
    first = [0] * 4 + [1] * 5 + [0]
    second = [0] * 4 + [0] * 5 + [1]
    found = significance.mcnemar(labels, first, second)
    # The predictions differ six times, five to one: p = 2 * (C(6, 0) + C(6, 1)) / 2**6.
    assert (found.only_first, found.only_second, found.p_value) == (1, 5, pytest.approx(14 / 64))
    assert significance.mcnemar(labels, first, first).p_value == 1


def test_bootstrap_intervals_have_the_theoretical_width():
    labels, predictions = drawn_predictions()
    accuracy, macro_f1 = significance.bootstrap(LabelledPredictions(labels, predictions))
    assert accuracy.value == (labels == predictions).double().mean().item()
    half = 1.96 * math.sqrt(accuracy.value * (1 - accuracy.value) / 400)
    assert accuracy.high - accuracy.value == pytest.approx(half, rel=0.1)
    assert accuracy.value - accuracy.low == pytest.approx(half, rel=0.1)
    assert macro_f1.low < macro_f1.value < macro_f1.high
    assert significance.bootstrap(LabelledPredictions(labels, predictions), seed=1)[1] != macro_f1


def test_repeats_within_a_unit_are_resampled_together():
    """Repeated names make the interval narrower only if each repeat is a separate unit."""
    labels, predictions = drawn_predictions(100)
    once = significance.bootstrap(LabelledPredictions(labels, predictions), resamples=500)
    twice = LabelledPredictions(labels.repeat(2), predictions.repeat(2), [*range(100), *range(100)])
    assert significance.bootstrap(twice, resamples=500) == once
    scores = torch.eye(4)[twice.predictions]
    found = evaluation.evaluate(twice.labels, scores, "ABCD", units=twice.units, resamples=500)
    assert found.macro_f1 == once[1]
    apart = significance.bootstrap(dataclasses.replace(twice, units=None), resamples=500)
    ratio = (apart[0].high - apart[0].low) / (once[0].high - once[0].low)
    assert ratio == pytest.approx(math.sqrt(0.5), rel=0.15)
    with pytest.raises(ValueError, match="got 3 units for 100 names"):
        significance.bootstrap(LabelledPredictions(labels, predictions, "abc"))


def test_the_paired_bootstrap_finds_only_real_differences():
    labels, worse = drawn_predictions(right=0.6)
    better = torch.where(torch.arange(400) % 5 == 0, labels, worse)
    first, second = LabelledPredictions(labels, worse), LabelledPredictions(labels, better)
    accuracy, macro_f1 = significance.paired_bootstrap([first], [second], resamples=1000)
    hits = [(result.predictions == labels).double().mean().item() for result in (first, second)]
    assert accuracy.value == pytest.approx(hits[1] - hits[0])
    for difference in (accuracy, macro_f1):
        assert 0 < difference.low < difference.value < difference.high
        assert difference.p_value == pytest.approx(2 / 1001)
    swapped, _ = significance.paired_bootstrap([second], [first], resamples=1000)
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx(
        (-accuracy.value, -accuracy.high, -accuracy.low)
    )
    for difference in significance.paired_bootstrap([first], [first], resamples=20):
        assert dataclasses.astuple(difference) == (0, 0, 0, 1)


def test_the_paired_bootstrap_averages_over_splits():
    """A name that occurs in several splits does not count as additional evidence."""
    labels, worse = drawn_predictions(100, right=0.6)
    _, better = drawn_predictions(100, right=0.8)
    first, second = (
        LabelledPredictions(labels, predictions, range(100)) for predictions in (worse, better)
    )
    single = significance.paired_bootstrap([first], [second], resamples=200)
    same = significance.paired_bootstrap([first] * 5, [second] * 5, resamples=200)
    for found, wanted in zip(same, single, strict=True):
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))
    equal = LabelledPredictions(labels, better, range(100, 200))
    halved = significance.paired_bootstrap([first, equal], [second, equal], resamples=200)
    assert halved[0].value == pytest.approx(single[0].value / 2)
    with pytest.raises(ValueError, match="different names"):
        significance.paired_bootstrap(
            [LabelledPredictions(labels, worse)], [LabelledPredictions(labels + 1, worse)]
        )


def test_the_corrected_t_test_scales_the_variance():
    differences = [0.01, 0.02, 0.03, 0.0, 0.04]
    plain = stats.ttest_1samp(differences, 0)
    found = significance.corrected_t_test(differences, 0)
    ends = plain.confidence_interval()
    assert dataclasses.astuple(found) == pytest.approx((0.02, ends.low, ends.high, plain.pvalue))
    # A test set 2/7 as large as the training set scales the variance by (1/5 + 2/7) / (1/5).
    wider = significance.corrected_t_test(differences, 2 / 7)
    ratio = (wider.high - wider.value) / (found.high - found.value)
    assert ratio == pytest.approx(math.sqrt((1 / 5 + 2 / 7) / (1 / 5)))
    assert wider.p_value > found.p_value
    assert significance.corrected_t_test([0, 0], 0.3).p_value == 1
    assert significance.corrected_t_test([0.1, 0.1], 0.3).p_value == 0
    with pytest.raises(ValueError, match="at least two splits"):
        significance.corrected_t_test([0.1], 0.3)


@pytest.fixture(scope="module")
def endings():
    """Return names whose last character reveals the language; one language has more names."""
    stems = [f"{a}{b}" for a in "bcdfgh" for b in "klmnpq"]
    rows = [(f"{stem}x", 0) for stem in stems] + [(f"x{stem}", 1) for stem in stems[:18]]
    return split(NamesData("endings", ("end", "start"), tuple(rows)))


def test_the_majority_baseline_predicts_training_frequencies(endings):
    scores = baselines.majority_baseline(endings)
    counts = endings.train.labels.bincount().double()
    assert scores.test.shape == (len(endings.test), 2)
    assert scores.validation.shape == (len(endings.validation), 2)
    assert torch.allclose(scores.test, (counts / counts.sum()).log().expand_as(scores.test))


def test_the_ngram_baseline_recognizes_name_endings(endings):
    scores = baselines.ngram_baseline(endings)
    for part, values in ((endings.validation, scores.validation), (endings.test, scores.test)):
        assert torch.equal(values.argmax(1), part.labels)
        assert torch.allclose(values.exp().sum(1), torch.ones(len(part), dtype=torch.float64))
    # N-grams of one character do not show which character comes last.
    single = baselines.NgramSettings(longest=1)
    shorter = baselines.ngram_baseline(endings, single)
    assert not torch.equal(shorter.test.argmax(1), endings.test.labels)


def test_the_ngram_baseline_applies_the_prior_correction(endings):
    plain, corrected = (
        baselines.ngram_baseline(endings, baselines.NgramSettings(prior_correction=tau)).test
        for tau in (0, 0.5)
    )
    expected = (plain - 0.5 * endings.priors().log()).log_softmax(1)
    assert torch.allclose(corrected, expected)


def test_a_language_without_training_names_is_improbable(endings):
    """A random split may leave a language without training names. Its scores must stay finite."""
    labels = endings.train.labels
    for trained in (0, 1):  # training names in two languages, then in one
        train = dataclasses.replace(endings.train, labels=labels * (1 - trained))
        without = dataclasses.replace(endings, languages=("end", "start", "never"), train=train)
        for scores in (baselines.majority_baseline(without), baselines.ngram_baseline(without)):
            assert scores.test.isfinite().all()
            assert (scores.test[:, 2] < -20).all()


@pytest.mark.filterwarnings("error")
def test_language_names_are_drawn_as_plain_text(tmp_path):
    """Figures do not interpret language names as formulas or control sequences."""
    folder = tmp_path / "pictures"
    languages = [r"$\frac$", "a\x1b[2J", "_^{$"]
    found = evaluation.evaluate([0, 1, 2], torch.eye(3), languages, resamples=10)
    figures.draw_confusion_matrix(folder / "matrix.png", found, "Title")
    figures.draw_calibration(folder / "calibration.png", {"a": found, "b": found}, "Title")
    epochs = read_epochs([EPOCH, {**EPOCH, "number": 2}, {**EPOCH, "member": 2}])
    figures.draw_learning_curves(folder / "curves.png", epochs, "Title")
    sizes = [image.imread(picture).shape[:2] for picture in folder.iterdir()]
    assert len(sizes) == 3
    assert min(map(min, sizes)) > 400


ODD_EPOCHS = [
    *(1, {}, EPOCH | {"member": "1"}, EPOCH | {"number": True}, EPOCH | {"odd": 1}),
    *(EPOCH | {"train_loss": odd} for odd in (math.nan, 1e10, 10**400, None)),
]


@pytest.mark.parametrize("history", [None, {}, [], *([EPOCH, odd] for odd in ODD_EPOCHS)])
def test_an_invalid_history_is_rejected(history):
    assert read_epochs([EPOCH]) == [Epoch(**EPOCH)]
    with pytest.raises((TypeError, ValueError)):
        read_epochs(history)


def small_model(classes, seed=0):
    torch.manual_seed(seed)
    return NameClassifier(classes, embedding_size=8, hidden_size=8).eval()


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a small random model with the given records."""

    def save(model=None, languages=PARTS.languages, **info):
        path = tmp_path / "model.safetensors"
        record = {"split": PARTS.info, "history": [EPOCH], "seed": 5, **info}
        save_checkpoint(path, Checkpoint(model or small_model(len(languages)), languages, record))
        return path

    return save


@pytest.fixture
def fails(run):
    """Return a function that runs `evaluate`, expects it to fail and returns the error message."""

    def fails(path, *argv):
        out, err = run("evaluate", "--checkpoint", path, *argv, code=2)
        start, _, message = err.splitlines()[-1].partition(" error: ")
        assert (out, start) == ("", "python -m namernn_fast.names:")
        return message

    return fails


def test_the_command_reports_all_metrics(run, save, tmp_path):
    model = NameEnsemble([small_model(18, 1), small_model(18, 2)]).eval()
    json_file, folder = tmp_path / "new" / "figures.json", tmp_path / "pictures"
    options = ("--json", json_file, "--figures", folder)
    out, _ = run("evaluate", "--checkpoint", save(model), *options)
    part = PARTS.test
    scores = {
        "majority": baselines.majority_baseline(PARTS).test,
        "n-grams": baselines.ngram_baseline(PARTS).test,
        "model": logits(model, part.names),
    }
    expected = {
        name: evaluation.evaluate(part.labels, values, PARTS.languages, units=part.texts)
        for name, values in scores.items()
    }
    ngrams, ours = (
        LabelledPredictions(part.labels, scores[name].argmax(1), part.texts)
        for name in ("n-grams", "model")
    )
    tests = {"mcnemar": significance.mcnemar(part.labels, ngrams.predictions, ours.predictions)}
    tests |= zip(
        ("accuracy", "macro_f1"), significance.paired_bootstrap([ngrams], [ours]), strict=True
    )
    values = json.loads(json_file.read_bytes())
    figures_of = {name: dataclasses.asdict(figures) for name, figures in expected.items()}
    assert values["evaluations"] == json.loads(json.dumps(figures_of))
    assert values["model_minus_ngrams"] == {
        name: dataclasses.asdict(test) for name, test in tests.items()
    }
    assert values["split"] == PARTS.info
    assert values["model"]["seed"] == 5
    assert values["ngrams"]["longest"] == baselines.NGRAMS.longest
    assert values["ceiling"] == 1
    lines = out.splitlines()
    assert lines[0].startswith(
        f"{len(part)} names of the test part; split string, seed 3, "
        f"SHA-256 {PARTS.info['sha256'][:16]}…"
    )
    assert [line.split()[0] for line in lines[3:7]] == ["ceiling", *scores]
    share = expected["model"].accuracy
    assert f"{100 * share.value:.1f} ({100 * share.low:.1f} to" in lines[6]
    assert f"exact McNemar p = {tests['mcnemar'].p_value:.2g}" in out
    names = ["calibration.png", "confusion_matrix.png", "learning_curves.png"]
    assert sorted(figure.name for figure in folder.iterdir()) == names


def test_the_validation_set_can_be_evaluated_without_ngrams(run, save, tmp_path):
    path = save(seed=math.nan, history=[{}])
    json_file, folder = tmp_path / "figures.json", tmp_path / "pictures"
    options = ("--part", "validation", "--no-ngrams", "--json", json_file, "--figures", folder)
    out, err = run("evaluate", "--checkpoint", path, *options)
    assert "n-grams" not in out + err
    assert out.startswith(f"{len(PARTS.validation)} names of the validation part")
    values = json.loads(json_file.read_bytes(), parse_constant=pytest.fail)
    assert list(values["evaluations"]) == ["majority", "model"]
    assert values["model_minus_ngrams"] is values["ngrams"] is values["model"]["seed"] is None
    assert err.endswith("the checkpoint records no epochs, so there are no learning curves\n")
    drawn = ["calibration.png", "confusion_matrix.png"]
    assert sorted(figure.name for figure in folder.iterdir()) == drawn


def test_evaluate_reports_test_names_that_a_random_split_leaks(run, save, make_folder):
    folder = make_folder(dict.fromkeys(embedded_sample().languages, "kim\nlee\n" * 5))
    parts = split(read_names(folder), method="random")
    options = ("--no-ngrams", "--data", folder)
    out, err = run("evaluate", "--checkpoint", save(split=parts.info), *options)
    assert "split random, seed 0" in out
    assert "the split is random: 100.0% of the test part are names that" in err


SAMPLE = PARTS.info["data"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *(
            ({"split": record}, "the checkpoint does not record the data and split of its training")
            for record in (
                None,
                *(PARTS.info | {name: None} for name in ("method", "seed", "validation", "test")),
                *(PARTS.info | {name: None} for name in ("sha256", "data")),
                *(
                    PARTS.info | {"data": SAMPLE | {name: None}}
                    for name in ("sha256", "rows", "source")
                ),
            )
        ),
        ({"split": PARTS.info | {"seed": 4}}, "this version splits the data differently"),
        ({"split": PARTS.info | {"test": math.nan}}, "the shares of the validation and the test"),
        ({"languages": PARTS.languages[::-1]}, "the languages of the model differ from"),
    ],
)
def test_a_split_that_cannot_be_reproduced_is_rejected(fails, save, change, reason):
    assert fails(save(**change)).startswith(reason)


def test_data_that_the_model_was_not_trained_on_is_rejected(fails, save):
    """The error escapes and shortens the description of the data in the checkpoint."""
    data = SAMPLE | {"source": "\x1b[2J\n" * 200, "sha256": "\u202e"}
    message = fails(save(split=PARTS.info | {"data": data}))
    source = "the embedded sample: not the data that the model was trained on"
    assert message.startswith(source)
    found = f"the SHA-256 is {SAMPLE['sha256'][:16]}…"
    assert rf"{found}, not \u202e… (365 rows from \x1b[2J \x1b[2J" in message
    assert len(message) < 1500
    assert message.endswith(
        "pass that data with --data, or a model trained on this data with --checkpoint "
        "(default: the pretrained model)"
    )


def test_a_damaged_model_is_reported(fails, save):
    model = small_model(18)
    for value in model.classifier.parameters():
        torch.nn.init.constant_(value, 3e38)
    message = fails(save(model), "--no-ngrams")
    assert message == "the model is damaged: its scores are not finite"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figures", "model.safetensors"], "model.safetensors: not a folder"),
        (["--figures", "taken"], "taken/calibration.png: not a regular file"),
        (["--json", "taken"], "taken: not a regular file"),
        (["--json", "model.safetensors"], "--json would overwrite what --checkpoint reads, "),
        (["--figures", "linked"], "--figures would overwrite what --checkpoint reads, "),
        (
            ["--json", "names/A.txt", "--data", "names"],
            "--json would overwrite what --data reads, ",
        ),
    ],
)
def test_invalid_output_paths_are_rejected(
    fails, save, make_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    names = make_folder({"A": "Kim\n"})
    path = save()
    (tmp_path / "taken" / "calibration.png").mkdir(parents=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "calibration.png").symlink_to(path)
    assert fails(path, *options).startswith(message)
    assert load_checkpoint(path).languages
    assert (names / "A.txt").read_text() == "Kim\n"
