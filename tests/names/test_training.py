"""Tests batches, training steps and the training loop."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from namernn_fast import FusedRNN
from namernn_fast.names import (
    Batch,
    InputError,
    NameClassifier,
    NamesData,
    Predictor,
    Recipe,
    batches,
    fit,
    split,
    steps,
    train_epoch,
    train_step,
    training,
    validate,
)
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.prediction import logits
from namernn_fast.testing import assert_within_budget

SAMPLE = embedded_sample()
PARTS = split(SAMPLE)
LETTERS = len(PARTS.folding.alphabet)
SMALL = {"embedding_size": 16, "hidden_size": 32}
SHORT = Recipe(epochs=2, model=SMALL)
ELABORATE = SHORT.changed(
    schedule="one-cycle",
    clip_norm=1.0,
    label_smoothing=0.1,
    weight_decay=0.01,
    members=2,
    prior_correction=0.1,
    model={
        "bidirectional": True,
        "num_layers": 2,
        "dropout": 0.3,
        "state_dropout": 0.1,
        "character_dropout": 0.1,
        "pooling": "last+mean+max",
    },
)


def test_batches_contain_every_name_once_with_its_label():
    train = PARTS.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    seen = []
    for names, labels, weight in batches(train, order, 50):
        assert names.sorted_indices is None
        assert weight == 1
        assert len(labels) == names.batch_sizes[0] <= 50
        padded, lengths = nn.utils.rnn.pad_packed_sequence(names, batch_first=True)
        for ids, length, label in zip(padded, lengths, labels, strict=True):
            seen.append(("".join(PARTS.folding.alphabet[i] for i in ids[:length]), int(label)))
    assert sorted(seen) == sorted(zip(train.texts, train.labels.tolist(), strict=True))


def test_processes_divide_each_batch():
    """The weighted mean over processes equals the batch's mean, even for a batch of one name."""
    train = PARTS.train
    order = torch.arange(7)
    whole = list(batches(train, order, 3))
    shares = [list(batches(train, order, 3, rank=rank, processes=2)) for rank in range(2)]
    assert [len(batch.targets) for batch in whole] == [3, 3, 1]
    assert [batch.weight for batch in shares[1]] == [2 / 3, 2 / 3, 0]
    # Use a random value per label instead of each name's loss.
    values = torch.rand(18)
    for batch, *parts in zip(whole, *shares, strict=True):
        mean = sum(values[part.targets].mean() * part.weight for part in parts) / 2
        torch.testing.assert_close(mean, values[batch.targets].mean())


def figures(history):
    return [replace(epoch, seconds=0) for epoch in history]


@pytest.mark.parametrize(("recipe", "rnn_class"), [(SHORT, nn.RNN), (ELABORATE, FusedRNN)])
def test_training_with_the_same_seed_is_bit_identical(recipe, rnn_class):
    state = torch.get_rng_state()
    first, second, other = (
        fit(PARTS, recipe, seed=seed, rnn_class=rnn_class) for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert figures(first.history) == figures(second.history) != figures(other.history)
    expected = first.checkpoint.model.state_dict()
    torch.testing.assert_close(second.checkpoint.model.state_dict(), expected, rtol=0, atol=0)


def test_the_loss_falls_and_the_history_is_complete():
    reported = []
    fitted = fit(PARTS, SHORT.changed(epochs=3, batch_size=32), report=reported.append)
    assert type(fitted.checkpoint.model.rnn) is FusedRNN
    assert not fitted.checkpoint.model.training
    assert fitted.checkpoint.languages == SAMPLE.languages
    assert fitted.history == tuple(reported)
    assert [epoch.number for epoch in reported] == [1, 2, 3]
    assert reported[0].train_loss > reported[1].train_loss > reported[2].train_loss
    assert reported[0].validation_loss > reported[2].validation_loss
    assert all(epoch.seconds > 0 for epoch in reported)


@pytest.fixture
def step():
    return next(batches(PARTS.train, torch.arange(len(PARTS.train)), 64))


def sgd(lr):
    """Returns a model and its optimizer. The initial weights are the same in every call."""
    torch.manual_seed(0)
    model = NameClassifier(18, alphabet_size=LETTERS, **SMALL)
    return model, torch.optim.SGD(model.parameters(), lr)


def test_the_gradient_is_clipped_only_if_requested(step):
    def moved(clip_norm):
        model, optimizer = sgd(1.0)
        before = nn.utils.parameters_to_vector(model.parameters())
        train_step(model, optimizer, step, Recipe(clip_norm=clip_norm))
        return (nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()

    free = moved(None)
    assert moved(free / 2) < free
    assert moved(2 * free) == free


@pytest.mark.parametrize("certain", [True, False])
def test_train_step_returns_the_loss_and_hits_before_the_step(step, certain):
    model, optimizer = sgd(1.0)
    labels = step.targets
    if not certain:
        step = step._replace(targets=F.one_hot(labels, 18).float())
    scores = model(step.names)
    loss, hits = train_step(model, optimizer, step, Recipe(label_smoothing=0.2))
    assert torch.equal(loss, F.cross_entropy(scores, step.targets, label_smoothing=0.2))
    assert hits == (scores.argmax(1) == labels).sum()
    assert not loss.requires_grad
    assert not torch.equal(model(step.names), scores)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [1.0, 2 / 3, 0.0])
@pytest.mark.parametrize("certain", [True, False])
def test_the_gradient_of_the_loss_matches_autograd(certain, weight, smoothing):
    torch.manual_seed(1)
    scores = 5 * torch.randn(37, 18)
    targets = torch.randint(18, (37,)) if certain else torch.randn(37, 18).softmax(1)
    found = steps._loss_gradient(scores, Batch(None, targets, weight), smoothing)

    def expected(dtype):
        precise = scores.to(dtype, copy=True).requires_grad_()
        labels = targets if certain else targets.to(dtype)
        loss = F.cross_entropy(precise, labels, label_smoothing=smoothing)
        (loss * weight).backward()
        return precise.grad

    gradients = (found, expected(torch.float32), expected(torch.float64))
    assert_within_budget(*({"gradient": each} for each in gradients))


@pytest.mark.parametrize("kept", [0, 100, 10**6])
def test_an_epoch_reports_the_mean_over_its_names(kept, monkeypatch):
    """The mean does not depend on `_KEPT_NUMBERS`, and ignores batches with a weight of 0."""
    monkeypatch.setattr(steps, "_KEPT_NUMBERS", kept)
    recipe = Recipe(label_smoothing=0.1)
    model, optimizer = sgd(0.0)
    epoch = list(batches(PARTS.train, torch.arange(100), 32))
    epoch.append(epoch[0]._replace(weight=0.0))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loss, accuracy = train_epoch(model, optimizer, epoch, recipe, scheduler)
    assert scheduler.last_epoch == 5
    scores = logits(model, PARTS.train.names)[:100]
    labels = PARTS.train.labels[:100]
    expected = F.cross_entropy(scores, labels, label_smoothing=0.1).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == (scores.argmax(1) == labels).double().mean().item()


def test_the_learning_rate_changes_at_every_step(monkeypatch):
    recipe = SHORT.changed(schedule="one-cycle", batch_size=100)
    rates = []

    def noted(model, optimizer, batch, recipe, step=steps._step):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, optimizer, batch, recipe)

    monkeypatch.setattr(steps, "_step", noted)
    fit(PARTS, recipe)
    assert len(rates) == 2 * math.ceil(len(PARTS.train) / 100)
    # By default, torch raises the rate from lr / 25 to lr, then lowers it to lr / 25 / 10,000.
    ends = (rates[0], max(rates), rates[-1])
    assert ends == pytest.approx((recipe.lr / 25, recipe.lr, recipe.lr / 25e4), rel=0.05)


def test_validate_returns_the_mean_over_names():
    held = PARTS.validation
    model = NameClassifier(
        18, rnn_class=nn.RNN, num_layers=2, dropout=0.5, alphabet_size=LETTERS, **SMALL
    )
    loss, accuracy = validate(model, held)
    assert not model.training
    scores = model(held.names.pack(torch.arange(len(held))))
    assert loss == pytest.approx(F.cross_entropy(scores, held.labels).item(), rel=1e-5)
    assert accuracy == (scores.argmax(1) == held.labels).double().mean().item()


def test_the_weights_of_the_best_epoch_are_kept():
    """With a learning rate this large, the accuracy fluctuates from epoch to epoch."""
    recipe = SHORT.changed(epochs=12, lr=0.05, members=2)
    fitted = fit(PARTS, recipe)
    for number, member in enumerate(fitted.checkpoint.model.members, 1):
        epochs = [epoch for epoch in fitted.history if epoch.member == number]
        # If several epochs are equally good, the first is kept.
        best = max(epochs, key=lambda epoch: epoch.validation_accuracy)
        assert validate(member, PARTS.validation) == (
            best.validation_loss,
            best.validation_accuracy,
        )
        assert best.number < recipe.epochs
    metrics = fitted.checkpoint.info["metrics"]
    loss, accuracy = validate(fitted.checkpoint.model, PARTS.validation)
    assert (metrics["validation_loss"], metrics["validation_accuracy"]) == (loss, accuracy)
    assert metrics["test_accuracy"] == validate(fitted.checkpoint.model, PARTS.test)[1]


def test_the_last_layer_includes_the_prior_correction():
    recipe = SHORT.changed(prior_correction=0.3, members=2)
    ours, plain = (
        logits(fit(PARTS, each).checkpoint.model, PARTS.validation.names).double()
        for each in (recipe, recipe.changed(prior_correction=0.0))
    )
    expected = plain - 0.3 * PARTS.priors().log()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_training_works_if_a_language_has_no_training_names():
    """A random split may leave a language without training names, so that its prior is 0."""
    rows = (*((f"Name{letter}", 0) for letter in "abcdefghijklmnopqrst"), ("Odd", 1))
    data = NamesData("few", ("A", "B"), rows)
    drawn = (split(data, method="random", seed=seed) for seed in range(99))
    parts = next(parts for parts in drawn if 1 not in parts.train.labels)
    for correction in (0.0, 0.5):
        fitted = fit(parts, SHORT.changed(prior_correction=correction))
        assert Predictor(fitted.checkpoint).probabilities(["Odd"]).isfinite().all()


@pytest.mark.parametrize("where", ["in training", "in the last step"])
def test_a_loss_that_is_not_finite_stops_training(where, monkeypatch):
    def train(model, *_):
        if where == "in training":
            return math.nan, 0.5
        nn.init.constant_(model.classifier.bias, torch.nan)
        return 1.0, 0.5

    monkeypatch.setattr(training, "train_epoch", train)
    with pytest.raises(RuntimeError, match=r"^the loss became nan in epoch 1: try a smaller"):
        fit(PARTS, SHORT)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("epochs", 0), ("epochs", 1.5), ("epochs", True), ("batch_size", -1), ("members", 0)),
        *(("lr", 0), ("lr", math.nan), ("lr", math.inf), ("schedule", "cosine")),
        *(("weight_decay", -1), ("label_smoothing", 1), ("clip_norm", 0)),
        ("prior_correction", -0.1),
    ],
)
def test_invalid_recipes_are_rejected(option, value):
    with pytest.raises(InputError, match=f"^the recipe's {option} cannot be {value!r}$"):
        Recipe(**{option: value})
    with pytest.raises(InputError, match=r"^3,000 epochs in total, but at most 2,500 are allowed$"):
        Recipe(epochs=1000, members=3)


def test_training_shows_progress_only_on_a_terminal(capsys, monkeypatch):
    once = SHORT.changed(epochs=1)
    for terminal, progress in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        fit(PARTS, once, progress=progress)
        assert ("epoch 1/1:   0%" in capsys.readouterr().err) == (terminal and progress)
