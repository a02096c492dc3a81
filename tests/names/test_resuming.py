"""Tests that resumed training gives the same result as training without interruption."""

from dataclasses import replace
from unittest import mock

import bounds
import pytest
import torch
from bounds import LEFT_OUT
from hypothesis import given, settings
from hypothesis import strategies as st

from namernn_fast.names import InputError, Recipe, StateFile, fit, split, tensor_files, training
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.resuming import KIND

PARTS = split(embedded_sample())
SMALL = {"embedding_size": 5, "hidden_size": 7}
PLAIN = Recipe(epochs=3, lr=0.01, model=SMALL)
RECIPES = {
    "plain": PLAIN,
    "one-cycle": PLAIN.changed(schedule="one-cycle", clip_norm=1.0, weight_decay=0.01),
    "ensemble": PLAIN.changed(
        epochs=2,
        members=2,
        schedule="one-cycle",
        model={"num_layers": 2, "dropout": 0.2, "state_dropout": 0.1, "character_dropout": 0.1},
    ),
}
# JSON turns the tuple into a list and the integer key into a string.
IDENTITY = {"seed": 0, "recipe": PLAIN.values(), "sizes": (1, 2), "numbers": {1: 0.1}}


def resumed(path, recipe, identity=IDENTITY):
    state = StateFile(path, identity)
    state.read()
    return fit(PARTS, recipe, state=state)


def outcome(fitted):
    """Returns the info and the weights of a trained model, except its date and durations."""
    info = {**fitted.checkpoint.info, "history": [replace(e, seconds=0) for e in fitted.history]}
    del info["trained"]
    return info, {
        name: value.tolist() for name, value in fitted.checkpoint.model.state_dict().items()
    }


def train_one_epoch(path, recipe, monkeypatch):
    """Resumes training if the state file exists, completes one epoch and interrupts the next."""
    train_epoch = training.train_epoch
    begun = []

    def train_some(model, optimizer, steps, *arguments):
        begun.append(1)
        if len(begun) > 1:
            train_epoch(model, optimizer, [next(iter(steps))], *arguments)
            raise KeyboardInterrupt
        return train_epoch(model, optimizer, steps, *arguments)

    state = StateFile(path, IDENTITY)
    if path.exists():
        state.read()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_epoch", train_some)
        with pytest.raises(KeyboardInterrupt):
            fit(PARTS, recipe, state=state)


@pytest.mark.parametrize("name", RECIPES)
def test_interruptions_in_every_epoch_do_not_change_the_result(name, tmp_path, monkeypatch):
    recipe, path = RECIPES[name], tmp_path / "state"
    for _ in range(recipe.epochs * recipe.members - 1):
        train_one_epoch(path, recipe, monkeypatch)
    assert outcome(resumed(path, recipe)) == outcome(fit(PARTS, recipe))


def test_finished_training_is_not_repeated(tmp_path, monkeypatch):
    """After training, the state contains only the weights of the networks."""
    path = tmp_path / "state"
    whole = fit(PARTS, RECIPES["ensemble"], state=StateFile(path, IDENTITY))
    tensors, _ = tensor_files.read_tensors(path, KIND)
    assert len(tensors) == len(whole.checkpoint.model.state_dict())
    monkeypatch.setattr(training, "train_epoch", None)
    again = resumed(path, RECIPES["ensemble"])
    assert again.history == whole.history
    assert outcome(again) == outcome(whole)


def refusal(path, recipe=PLAIN, identity=IDENTITY):
    return bounds.refusal(resumed, path, recipe, identity)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Returns the tensors, the values and the bytes of a state after one epoch."""
    path = tmp_path_factory.mktemp("kept") / "state"
    interrupt = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(PARTS, PLAIN, state=StateFile(path, IDENTITY), report=interrupt)
    return *tensor_files.read_tensors(path, KIND), path.read_bytes()


def changed(values, where, value):
    """Returns a copy of nested `values` with `value` at `where`, which is a sequence of keys."""
    key, *inner = where
    value = changed(values[key], inner, value) if inner else value
    if isinstance(values, list):
        return [*bounds.changed(dict(enumerate(values)), {key: value}).values()]
    return bounds.changed(values, {key: value})


EPOCH = ("members", "1", "history", 0)
ODD_VALUES = (LEFT_OUT, None, True, -1, "x", [], {}, 10**9, float("nan"))
PLACES = [
    *(("identity",), ("members",), ("members", "1"), ("members", "1", "history"), EPOCH),
    *((*EPOCH, name) for name in ("member", "number", "validation_accuracy")),
]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((where, value) for where in PLACES for value in ODD_VALUES),
        *((("members", number), {}) for number in ("x", "", "1.5", "-")),
    ],
    ids=str,
)
def test_a_state_with_invalid_values_is_rejected(kept, path, where, value):
    tensors, values, _ = kept
    tensor_files.write_tensors(path, KIND, tensors, changed(values, where, value))
    assert refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"1.odd": torch.ones(1)},
        {"1.best.classifier.bias": torch.ones(3)},
        {"1.best.classifier.bias": torch.full((18,), torch.nan)},
        {"1.model.classifier.bias": torch.ones(18, dtype=torch.float64)},
        {"1.model.classifier.bias": LEFT_OUT},
        {"1.optimizer.0.exp_avg": torch.ones(1)},
        {"1.optimizer.0.step": torch.ones(1)},
        {"1.optimizer.0.step": torch.tensor(torch.inf)},
        {"1.optimizer.99.step": torch.tensor(1.0)},
        {"1.optimizer.x.step": torch.tensor(1.0)},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_state_with_invalid_tensors_is_rejected(kept, path, change):
    tensors, values, _ = kept
    tensor_files.write_tensors(path, KIND, bounds.changed(tensors, change), values)
    assert refusal(path).startswith("not the state of this training run (")


def test_the_error_lists_settings_that_differ_from_the_state(kept, path):
    path.write_bytes(kept[-1])
    other = PLAIN.changed(lr=0.02, clip_norm=1.0, model={"hidden_size": 9, "pooling": "last"})
    assert refusal(path, other, {**IDENTITY, "seed": 1, "recipe": other.values()}) == (
        "the unfinished training was started with recipe clip_norm None, not 1.0; "
        "recipe lr 0.01, not 0.02; recipe model hidden_size 7, not 9; "
        "recipe model pooling None, not 'last'; seed 0, not 1; "
        "--resume needs the same data and options as the interrupted command"
    )


@settings(database=None, max_examples=25)
@given(st.data())
def test_resuming_from_a_changed_file_succeeds_or_raises_an_error(kept, path, data):
    content = bytearray(kept[-1])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        fitted = resumed(path, PLAIN)
    # If a changed byte makes a weight huge, training may diverge and raise a RuntimeError.
    except (InputError, RuntimeError):
        return
    assert len(fitted.history) == PLAIN.epochs
