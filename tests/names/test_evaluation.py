"""`names evaluate`: metrics by hand, intervals and tests, baselines, figures, the command."""

import dataclasses
import json
import math
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn", reason="the extra 'evaluate' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'evaluate' is not installed")

from scipy import stats
from sklearn import metrics

from namernn_fast.names import baselines, evaluation, figures, significance
from namernn_fast.names.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from namernn_fast.names.commands import evaluate as command
from namernn_fast.names.dataset import NamesData, embedded_sample, read_names
from namernn_fast.names.model import NameClassifier, NameEnsemble
from namernn_fast.names.significance import Answers
from namernn_fast.names.splitting import split

PROGRAM = "python -m namernn_fast.names: error:"
EPOCH = {
    "member": 1,
    "number": 1,
    "train_loss": 2.0,
    "train_accuracy": 0.2,
    "validation_loss": 2.1,
    "validation_accuracy": 0.1,
}


# Metrics, by hand


@pytest.fixture(scope="module")
def by_hand():
    """Five names of four languages; the fourth language has no name and is never said."""
    probabilities = [
        [0.7, 0.1, 0.1, 0.1],  # right
        [0.5, 0.3, 0.1, 0.1],  # right
        [0.55, 0.15, 0.2, 0.1],  # B is third
        [0.1, 0.7, 0.1, 0.1],  # right
        [0.4, 0.3, 0.1, 0.2],  # C is fourth
    ]
    labels = [0, 0, 1, 1, 2]
    return evaluation.evaluate(labels, torch.tensor(probabilities).log(), "ABCD")


def test_shares_by_hand(by_hand):
    assert (by_hand.names, by_hand.accuracy.hits, by_hand.accuracy.value) == (5, 3, 0.6)
    # Wilson's interval of 3 of 5.
    assert (by_hand.accuracy.low, by_hand.accuracy.high) == pytest.approx(
        (0.2307, 0.8824), abs=1e-4
    )
    assert (by_hand.top3.hits, by_hand.top3.value) == (4, 0.8)
    assert by_hand.confusion == ((2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 0))
    # F1: A 2*2/(2+4), B 2*1/(2+1), C 0; D has no name and does not count.
    assert by_hand.macro_f1.value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_languages_by_hand(by_hand):
    a, b, c, d = by_hand.languages
    assert (a.names, a.predicted, a.precision.value, a.recall.value) == (2, 4, 0.5, 1)
    assert (b.names, b.predicted, b.precision.value, b.recall.value) == (2, 1, 1, 0.5)
    assert (c.names, c.predicted, c.precision, c.recall.value) == (1, 0, None, 0)
    assert (d.names, d.predicted, d.precision, d.recall) == (0, 0, None, None)
    assert [scores.f1 for scores in by_hand.languages] == pytest.approx([2 / 3, 2 / 3, 0, 0])


def test_probabilities_by_hand(by_hand):
    log_loss = -sum(map(math.log, (0.7, 0.5, 0.15, 0.7, 0.1))) / 5
    assert by_hand.log_loss == pytest.approx(log_loss)
    brier = (
        0.12 + (0.25 + 0.11) + (0.3025 + 0.7225 + 0.04 + 0.01) + 0.12 + (0.16 + 0.09 + 0.81 + 0.04)
    )
    assert by_hand.brier == pytest.approx(brier / 5)
    # Four bins are filled: 0.4 is wrong, 0.5 right, 0.55 wrong, and 0.7 twice right.
    assert by_hand.calibration_error == pytest.approx((0.4 + 0.5 + 0.55 + 2 * 0.3) / 5)
    filled = [bin for bin in by_hand.calibration if bin.names]
    assert [bin.names for bin in filled] == [1, 1, 1, 2]
    assert all(bin.low < bin.confidence + 1e-6 <= bin.high + 2e-6 for bin in filled)


def test_a_sure_classifier():
    """Probabilities of 1 are in the last bin, and a sure classifier has no error when right."""
    found = evaluation.evaluate([0, 1, 1], torch.eye(2)[[0, 1, 1]] * 1e6, "AB")
    assert found.accuracy.value == found.macro_f1.value == found.top3.value == 1
    assert found.log_loss == found.brier == found.calibration_error == 0
    assert found.calibration[-1].names == 3
    wrong = evaluation.evaluate([1, 0, 0], torch.eye(2)[[0, 1, 1]] * 1e6, "AB")
    assert (wrong.accuracy.value, wrong.brier, wrong.calibration_error) == (0, 2, 1)
    assert wrong.log_loss == 1e6


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_metrics_agree_with_scikit_learn(data):
    classes = data.draw(st.integers(2, 5))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    scores = 3 * torch.randn(len(labels), classes, generator=generator)
    # A shift of a name's logits changes nothing.
    shifted = scores + torch.randn(len(labels), 1, generator=generator)
    found = evaluation.evaluate(labels, scores, "ABCDE"[:classes], resamples=20)
    predictions = scores.argmax(1).tolist()
    present = sorted(set(labels))
    assert found.accuracy.value == metrics.accuracy_score(labels, predictions)
    assert found.macro_f1.value == pytest.approx(
        metrics.f1_score(labels, predictions, labels=present, average="macro", zero_division=0)
    )
    probabilities = scores.double().softmax(1).numpy()
    assert found.log_loss == pytest.approx(
        metrics.log_loss(labels, probabilities, labels=range(classes))
    )
    _, _, f1, _ = metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(classes), zero_division=0
    )
    assert [language.f1 for language in found.languages] == f1.tolist()
    again = evaluation.evaluate(labels, shifted, "ABCDE"[:classes], resamples=20)
    assert again.log_loss == pytest.approx(found.log_loss, rel=1e-4, abs=1e-6)
    assert again.confusion == found.confusion
    json.dumps(dataclasses.asdict(found), allow_nan=False)


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
def test_scores_that_cannot_be_evaluated(labels, scores):
    with pytest.raises(ValueError, match=r"do not go with|not finite"):
        evaluation.evaluate(labels, scores, "AB")


def test_the_best_function_of_the_string():
    texts, labels = ["a", "a", "a", "b", "b", "c"], [0, 0, 1, 1, 2, 2]
    assert evaluation.best_hits(texts, labels) == 2 + 1 + 1


# Intervals and paired tests


def drawn_answers(count=400, classes=4, right=0.8, seed=0):
    """Labels, and the answers of a classifier that has a share of them right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    hits = torch.rand(count, generator=generator) < right
    return labels, torch.where(hits, labels, (labels + 1) % classes)


def test_mcnemar_by_hand():
    labels = [0] * 10
    first = [0] * 4 + [1] * 5 + [0]
    second = [0] * 4 + [0] * 5 + [1]
    found = significance.mcnemar(labels, first, second)
    # Five against one: 2 * (C(6, 0) + C(6, 1)) / 2**6.
    assert (found.only_first, found.only_second, found.p_value) == (1, 5, pytest.approx(14 / 64))
    assert significance.mcnemar(labels, first, first).p_value == 1


def test_the_bootstrap_of_an_accuracy_is_as_wide_as_theory_says():
    labels, predictions = drawn_answers()
    accuracy, macro_f1 = significance.bootstrap(Answers(labels, predictions))
    assert accuracy.value == (labels == predictions).double().mean().item()
    half = 1.96 * math.sqrt(accuracy.value * (1 - accuracy.value) / 400)
    assert accuracy.high - accuracy.value == pytest.approx(half, rel=0.1)
    assert accuracy.value - accuracy.low == pytest.approx(half, rel=0.1)
    assert macro_f1.low < macro_f1.value < macro_f1.high


def test_the_bootstrap_is_determined_by_its_seed():
    answers = Answers(*drawn_answers())
    results = [significance.bootstrap(answers, resamples=50, seed=seed) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_units_are_drawn_together():
    """Each name twice in one unit tells no more than each name once; twice on its own seems to."""
    labels, predictions = drawn_answers(100)
    once = significance.bootstrap(Answers(labels, predictions), resamples=500)
    twice = Answers(labels.repeat(2), predictions.repeat(2), [*range(100), *range(100)])
    assert significance.bootstrap(twice, resamples=500) == once
    scores = torch.eye(4)[twice.predictions]
    found = evaluation.evaluate(twice.labels, scores, "ABCD", units=twice.units, resamples=500)
    assert found.macro_f1 == once[1]
    apart = significance.bootstrap(dataclasses.replace(twice, units=None), resamples=500)
    ratio = (apart[0].high - apart[0].low) / (once[0].high - once[0].low)
    assert ratio == pytest.approx(math.sqrt(0.5), rel=0.15)
    with pytest.raises(ValueError, match="3 units are given for 100 names"):
        significance.bootstrap(Answers(labels, predictions, "abc"))


def test_the_paired_bootstrap():
    labels, worse = drawn_answers(right=0.6)
    better = torch.where(torch.arange(400) % 5 == 0, labels, worse)
    first, second = Answers(labels, worse), Answers(labels, better)
    accuracy, macro_f1 = significance.paired_bootstrap([first], [second], resamples=1000)
    hits = [(answer.predictions == labels).double().mean().item() for answer in (first, second)]
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


def test_the_paired_bootstrap_over_splits():
    """The mean over splits; names that the splits have in common are not counted twice."""
    labels, worse = drawn_answers(100, right=0.6)
    _, better = drawn_answers(100, right=0.8)
    names = list(map(str, range(100)))
    one = ([Answers(labels, worse, names)], [Answers(labels, better, names)])
    single = significance.paired_bootstrap(*one, resamples=200)
    same = significance.paired_bootstrap(one[0] * 5, one[1] * 5, resamples=200)
    for found, wanted in zip(same, single, strict=True):
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(wanted))
    others = list(map(str, range(100, 200)))
    equal = Answers(labels, better, others)
    halved = significance.paired_bootstrap([*one[0], equal], [*one[1], equal], resamples=200)
    assert halved[0].value == pytest.approx(single[0].value / 2)
    with pytest.raises(ValueError, match="different names"):
        significance.paired_bootstrap([Answers(labels, worse)], [Answers(labels + 1, worse)])


def test_the_corrected_t_test():
    differences = [0.01, 0.02, 0.03, 0.0, 0.04]
    plain = stats.ttest_1samp(differences, 0)
    found = significance.corrected_t_test(differences, 0)
    ends = plain.confidence_interval()
    assert dataclasses.astuple(found) == pytest.approx((0.02, ends.low, ends.high, plain.pvalue))
    # With a test part of 2/7 of the training part the variance is (1/5 + 2/7) / (1/5) times that.
    wider = significance.corrected_t_test(differences, 2 / 7)
    ratio = (wider.high - wider.value) / (found.high - found.value)
    assert ratio == pytest.approx(math.sqrt((1 / 5 + 2 / 7) / (1 / 5)))
    assert wider.p_value > found.p_value
    assert significance.corrected_t_test([0, 0], 0.3).p_value == 1
    assert significance.corrected_t_test([0.1, 0.1], 0.3).p_value == 0
    with pytest.raises(ValueError, match="at least two splits"):
        significance.corrected_t_test([0.1], 0.3)


def test_a_comparison():
    labels, worse = drawn_answers(right=0.6)
    _, better = drawn_answers(right=0.8)
    scores = [torch.eye(4)[predictions] for predictions in (worse, better)]
    found = evaluation.compare(labels, *scores, resamples=100)
    assert found.mcnemar == significance.mcnemar(labels, worse, better)
    answers = [[Answers(labels, predictions)] for predictions in (worse, better)]
    assert (found.accuracy, found.macro_f1) == significance.paired_bootstrap(
        *answers, resamples=100
    )


# Baselines


@pytest.fixture(scope="module")
def endings():
    """Names whose language is told by the last character, in languages of different sizes."""
    stems = [f"{a}{b}" for a in "bcdfgh" for b in "klmnpq"]
    rows = [(f"{stem}x", 0) for stem in stems] + [(f"x{stem}", 1) for stem in stems[:18]]
    return split(NamesData("endings", ("end", "start"), tuple(rows)))


def test_the_majority_baseline(endings):
    scores = baselines.majority_baseline(endings)
    counts = endings.train.labels.bincount().double()
    assert scores.test.shape == (len(endings.test), 2)
    assert scores.validation.shape == (len(endings.validation), 2)
    assert torch.allclose(scores.test, (counts / counts.sum()).log().expand_as(scores.test))


def test_the_ngram_baseline_sees_the_ends_of_names(endings):
    scores = baselines.ngram_baseline(endings)
    for part, values in ((endings.validation, scores.validation), (endings.test, scores.test)):
        assert torch.equal(values.argmax(1), part.labels)
        assert torch.allclose(values.exp().sum(1), torch.ones(len(part), dtype=torch.float64))
    again = baselines.ngram_baseline(endings)
    assert torch.equal(again.test, scores.test)
    # Without n-grams longer than a character the marks at the ends tell nothing.
    single = baselines.NgramSettings(longest=1)
    shorter = baselines.ngram_baseline(endings, single)
    assert not torch.equal(shorter.test.argmax(1), endings.test.labels)


def test_the_prior_correction_of_the_ngrams(endings):
    plain, corrected = (
        baselines.ngram_baseline(endings, baselines.NgramSettings(prior_correction=tau)).test
        for tau in (0, 0.5)
    )
    expected = (plain - 0.5 * endings.priors().log()).log_softmax(1)
    assert torch.allclose(corrected, expected)


def test_a_language_that_is_never_trained(endings):
    """As a random split may leave one: its probability is small, and figures stay finite."""
    labels = endings.train.labels
    for trained in (0, 1):  # with two languages to fit, and with one
        train = dataclasses.replace(endings.train, labels=labels * (1 - trained))
        without = dataclasses.replace(endings, languages=("end", "start", "never"), train=train)
        for scores in (baselines.majority_baseline(without), baselines.ngram_baseline(without)):
            assert scores.test.isfinite().all()
            assert (scores.test[:, 2] < -20).all()


# Figures


def size_of(path):
    """Returns the width and the height of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


@pytest.mark.filterwarnings("error")
def test_figures_of_odd_languages(tmp_path):
    """The name of a language is no formula, and steers nothing."""
    folder = tmp_path / "pictures"
    languages = [r"$\frac$", "a\x1b[2J", "_^{$"]
    found = evaluation.evaluate([0, 1, 2], torch.eye(3), languages, resamples=10)
    figures.draw_confusion_matrix(folder / "matrix.png", found, "Title")
    figures.draw_calibration(folder / "calibration.png", {"a": found, "b": found}, "Title")
    epochs = [EPOCH, {**EPOCH, "number": 2}, {**EPOCH, "member": 2}]
    figures.draw_learning_curves(folder / "curves.png", epochs, "Title")
    sizes = {path.name: size_of(path) for path in folder.iterdir()}
    assert len(sizes) == 3
    assert min(map(min, sizes.values())) > 400


def test_many_languages_are_bounded(monkeypatch):
    """The figure grows with the languages up to a bound, from which on it has no numbers."""
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    for count in (3, 18, 60):
        languages = list(map(str, range(count)))
        found = evaluation.evaluate([0, 1], torch.eye(count)[:2], languages, resamples=10)
        figures.draw_confusion_matrix(None, found, "Title")
    widths = [figure.get_figwidth() for figure in drawn]
    assert widths[0] < widths[1] < widths[2] < 25
    assert [len(figure.axes[0].texts) for figure in drawn] == [2, 2, 0]


@pytest.mark.parametrize(
    "history",
    [
        None,
        {},
        [],
        [1],
        [{}],
        [{**EPOCH, "member": "1"}],
        [{**EPOCH, "number": True}],
        [{**EPOCH, "number": 0}],
        [{**EPOCH, "train_loss": math.nan}],
        [{**EPOCH, "train_loss": 10**400}],
        [{**EPOCH, "validation_accuracy": None}],
        [EPOCH, {}],
    ],
)
def test_a_history_that_cannot_be_drawn(history):
    assert figures.usable_history(history) is None
    assert figures.usable_history([EPOCH]) == [EPOCH]


# The command


@pytest.fixture(scope="module")
def sample_split():
    return split(embedded_sample(), seed=3)


def small_model(classes, seed=0):
    torch.manual_seed(seed)
    return NameClassifier(classes, embedding_size=8, hidden_size=8).eval()


@pytest.fixture
def save(tmp_path, sample_split):
    """Save a small model with random weights, and change what it records."""

    def save(model=None, languages=sample_split.languages, **info):
        path = tmp_path / "model.safetensors"
        record = {"split": sample_split.info, "history": [EPOCH], "seed": 5, **info}
        checkpoint = Checkpoint(model or small_model(len(languages)), languages, record)
        save_checkpoint(path, checkpoint)
        return path

    return save


@pytest.fixture
def fails(run):
    """Run with a model, expecting nothing but a line on standard error after the model's note."""

    def fails(path, *argv):
        code, out, err = run("evaluate", "--checkpoint", path, *argv)
        assert out == ""
        last = err.splitlines()[-1]
        assert last.startswith(f"{PROGRAM} ")
        return code, last.removeprefix(f"{PROGRAM} ")

    return fails


def test_the_command(run, save, tmp_path, sample_split):
    model = NameEnsemble([small_model(18, 1), small_model(18, 2)]).eval()
    json_file, folder = tmp_path / "new" / "figures.json", tmp_path / "pictures"
    path = save(model)
    code, out, err = run(
        *("evaluate", "--checkpoint", path, "--json", json_file, "--figures", folder)
    )
    assert code == 0
    assert err.splitlines() == [
        f"the model is {path}, not the pretrained one: training date not recorded, "
        "test accuracy not recorded",
        "this model was trained on the small embedded sample, not on the names data set",
        "fitting the baseline of character n-grams; --no-ngrams leaves it out",
    ]
    part = sample_split.test
    digest = sample_split.info["sha256"]
    lines = out.splitlines()
    assert lines[0].startswith(
        f"{len(part)} names of the test part; split string, seed 3, SHA-256 {digest[:16]}…"
    )
    assert [line.split()[0] for line in lines[3:7]] == ["ceiling", "majority", "n-grams", "model"]
    assert "exact McNemar p = " in out
    with torch.no_grad():
        scores = model(part.names.pack(torch.arange(len(part))))
    expected = evaluation.evaluate(part.labels, scores, sample_split.languages, units=part.texts)
    assert f"{100 * expected.accuracy.value:.1f} ({100 * expected.accuracy.low:.1f} to" in lines[6]
    values = json.loads(json_file.read_bytes())
    found = values["evaluations"]["model"]
    wanted = json.loads(json.dumps(dataclasses.asdict(expected)))
    assert found["languages"] == wanted["languages"]
    assert found["macro_f1"] == wanted["macro_f1"]
    assert found["log_loss"] == pytest.approx(wanted["log_loss"])
    ngrams = evaluation.evaluate(
        part.labels, baselines.ngram_baseline(sample_split).test, sample_split.languages
    )
    assert values["evaluations"]["n-grams"]["confusion"] == list(map(list, ngrams.confusion))
    comparison = values["model_minus_ngrams"]
    assert comparison["accuracy"]["value"] == pytest.approx(
        expected.accuracy.value - ngrams.accuracy.value
    )
    assert values["split"] == sample_split.info
    assert values["model"]["seed"] == 5
    assert values["ngrams"]["longest"] == baselines.NGRAMS.longest
    assert values["ceiling"] == 1
    names = ["calibration.png", "confusion_matrix.png", "learning_curves.png"]
    assert sorted(figure.name for figure in folder.iterdir()) == names
    assert all(min(size_of(folder / name)) > 400 for name in names)


def test_the_validation_part_without_ngrams(run, save, tmp_path, sample_split):
    json_file = tmp_path / "figures.json"
    options = ("--part", "validation", "--no-ngrams", "--json", json_file)
    code, out, err = run("evaluate", "--checkpoint", save(seed=math.nan), *options)
    assert code == 0
    assert "n-grams" not in out + err
    assert out.startswith(f"{len(sample_split.validation)} names of the validation part")
    values = json.loads(json_file.read_bytes(), parse_constant=pytest.fail)
    assert list(values["evaluations"]) == ["majority", "model"]
    assert values["model_minus_ngrams"] is values["ngrams"] is values["model"]["seed"] is None


def test_no_learning_curves_without_a_history(run, save, tmp_path, monkeypatch):
    drawn = []
    for name in ("draw_confusion_matrix", "draw_learning_curves", "draw_calibration"):
        monkeypatch.setattr(command, name, lambda path, *_: drawn.append(path.name))
    options = ("--no-ngrams", "--figures", tmp_path / "pictures")
    code, _, err = run("evaluate", "--checkpoint", save(history=[{}]), *options)
    assert code == 0
    assert err.endswith("the checkpoint records no epochs, so there are no learning curves\n")
    assert drawn == ["confusion_matrix.png", "calibration.png"]


def test_a_model_of_a_random_split(run, save, make_folder):
    """The user is told how many of the names the model may have seen."""
    folder = make_folder(dict.fromkeys(embedded_sample().languages, "kim\nlee\n" * 5))
    parts = split(read_names(folder), method="random")
    options = ("--no-ngrams", "--data", folder)
    code, out, err = run("evaluate", "--checkpoint", save(split=parts.info), *options)
    assert code == 0
    assert "split random, seed 0" in out
    assert "the split is random: 100.0% of the test part are names that" in err


def test_other_data_than_the_model_was_trained_with(fails, save, make_folder):
    folder = make_folder({"A": "Kim\nLee\nLu\n"})
    digest = read_names(folder).sha256
    code, message = fails(save(), "--data", folder)
    assert code == 2
    assert message.startswith(f"the folder {folder}: not the data that the model was trained with")
    assert f"its SHA-256 is {digest[:16]}…" in message
    needed = embedded_sample().sha256[:16]
    assert f"needed is {needed}… (365 rows from the embedded sample): name it with" in message


@pytest.mark.parametrize(
    "change",
    [
        {"method": "psychic"},
        {"seed": "0"},
        {"seed": True},
        {"validation": None},
        {"test": "0.2"},
        {"sha256": 1},
        {"data": None},
        {"data": {"sha256": 1, "source": "", "rows": 1, "is_sample": True}},
        {"data": {"sha256": "", "source": "", "rows": "1", "is_sample": True}},
    ],
)
def test_a_split_that_is_not_recorded(fails, save, sample_split, change):
    assert fails(save(split={**sample_split.info, **change})) == (
        2,
        "the checkpoint does not say on which split of which data it was trained",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 4}, "this version splits the data in another way"),
        ({"test": math.nan}, "the shares of the validation and the test part must be"),
    ],
)
def test_another_split_than_the_model_was_trained_with(fails, save, sample_split, change, reason):
    code, message = fails(save(split={**sample_split.info, **change}))
    assert code == 2
    assert message.startswith(reason)


def test_a_record_that_is_no_table(fails, save):
    assert fails(save(split="none"), "--data", "nowhere")[0] == 2


def test_other_languages_than_the_data_has(fails, save, sample_split):
    path = save(languages=tuple(reversed(sample_split.languages)))
    assert fails(path) == (2, "the model has other languages than the data that it names")


def test_a_source_does_not_steer_the_terminal(fails, save, sample_split):
    data = {**sample_split.info["data"], "source": "\x1b[2J\n" * 200, "sha256": "\u202e"}
    code, message = fails(save(split={**sample_split.info, "data": data}))
    assert code == 2
    assert r"\u202e… (365 rows from \x1b[2J \x1b[2J" in message
    assert len(message) < 1500


def test_a_model_that_is_damaged(fails, save):
    model = small_model(18)
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
        model.classifier.bias.fill_(3e38)
    code, message = fails(save(model), "--no-ngrams")
    assert (code, message) == (2, "the model gives scores that are not finite: it is damaged")


def test_targets_are_checked_before_the_work(fails, save, tmp_path):
    path = save()
    file = tmp_path / "file"
    file.write_text("")
    assert fails(path, "--figures", file) == (2, f"{file}: not a folder")
    assert fails(path, "--json", tmp_path) == (2, f"{tmp_path}: not a plain file")
    (tmp_path / "pictures" / "calibration.png").mkdir(parents=True)
    code, message = fails(path, "--figures", tmp_path / "pictures")
    assert (code, message) == (2, f"{tmp_path / 'pictures' / 'calibration.png'}: not a plain file")


@pytest.mark.parametrize(
    ("options", "written", "read"),
    [
        (["--json", "model.safetensors"], "--json", "--checkpoint"),
        (["--json", "names/A.txt", "--data", "names"], "--json", "--data"),
        (["--figures", "pictures"], "--figures", "--checkpoint"),
    ],
)
def test_what_is_read_is_not_overwritten(
    fails, save, make_folder, tmp_path, monkeypatch, options, written, read
):
    monkeypatch.chdir(tmp_path)
    make_folder({"A": "Kim\n"})
    path = save()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "calibration.png").symlink_to(path)
    code, message = fails(path, *options)
    assert code == 2
    assert message.startswith(f"{written} would overwrite what {read} reads, ")
    assert load_checkpoint(path).languages
    assert (tmp_path / "names" / "A.txt").read_text() == "Kim\n"


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_package(run, save, monkeypatch, tmp_path, module):
    path = save()
    monkeypatch.setitem(sys.modules, module, None)
    assert run("evaluate", "--checkpoint", path, "--figures", tmp_path / "pictures") == (
        1,
        "",
        f"{PROGRAM} {module} is not installed; run: pip install 'namernn_fast[evaluate]'\n",
    )
    assert not (tmp_path / "pictures").exists()


def test_the_real_data(real_folder):
    """The bounds of the table: the majority, and the best function of the string."""
    parts = split(read_names(real_folder))
    scores = baselines.majority_baseline(parts).test
    found = evaluation.evaluate(parts.test.labels, scores, parts.languages, resamples=10)
    russian = parts.languages.index("Russian")
    assert found.languages[russian].predicted == found.names == len(parts.test) > 3500
    assert found.accuracy.hits == found.languages[russian].names
    ceiling = evaluation.best_hits(parts.test.texts, parts.test.labels.tolist()) / found.names
    assert 0.955 < ceiling < 0.975
