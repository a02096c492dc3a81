"""Tests that checkpoints restore their model, and are not saved if loading would fail."""

from dataclasses import asdict, replace
from datetime import date
from itertools import product

import pytest
import torch
from bounds import bounded
from torch import nn

from namernn_fast import FusedRNN
from namernn_fast.names import (
    ASCII,
    Checkpoint,
    Epoch,
    InputError,
    NameClassifier,
    Recipe,
    fit,
    load_checkpoint,
    save_checkpoint,
    split,
    tensor_files,
)
from namernn_fast.names.checkpoint import check_loadable, recorded
from namernn_fast.names.dataset import embedded_sample
from namernn_fast.names.recipes import MAX_EPOCHS
from namernn_fast.names.text import MAX_LANGUAGES

LANGUAGES = ("Basque", "Welsh", "Maori")
INFO = {"split": {"data": {"is_sample": True}}}


@pytest.fixture(scope="module")
def trained():
    options = {"embedding_size": 8, "hidden_size": 12, "bidirectional": True, "num_layers": 2}
    recipe = Recipe(epochs=2, members=2, model={**options, "dropout": 0.2})
    return fit(split(embedded_sample()), recipe).checkpoint


@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_a_checkpoint_restores_the_model(trained, tmp_path, rnn_class):
    path = tmp_path / "new" / "names.safetensors"
    save_checkpoint(path, trained)
    loaded = load_checkpoint(path, rnn_class=rnn_class)
    assert list(path.parent.iterdir()) == [path]
    assert loaded.languages == trained.languages
    assert loaded.info == trained.info
    assert {type(member.rnn) for member in loaded.model.members} == {rnn_class}
    assert loaded.model.config == trained.model.config
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    for name, value in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)


def test_a_checkpoint_records_how_the_model_was_trained(trained):
    info = trained.info
    epochs = [(epoch["member"], epoch["number"]) for epoch in info["history"]]
    assert epochs == [*product((1, 2), (1, 2))]
    assert 0 <= info["metrics"]["validation_accuracy"] <= 1
    assert date.fromisoformat(info["trained"]).isoformat() == info["trained"]
    assert set(info["versions"]) == {"namernn_fast", "torch", "python"}


def test_a_float16_checkpoint_is_loaded_as_float32(trained, tmp_path):
    path = tmp_path / "half.safetensors"
    save_checkpoint(path, trained, torch.float16)
    half = load_checkpoint(path).model
    for name, value in trained.model.state_dict().items():
        assert half.state_dict()[name].dtype == torch.float32
        assert torch.equal(half.state_dict()[name], value.half().float())


@pytest.mark.parametrize(("value", "dtype"), [(1e5, torch.float16), (float("nan"), torch.float32)])
def test_non_finite_weights_are_not_saved(tmp_path, value, dtype):
    model = NameClassifier(3, 2, 3)
    nn.init.constant_(model.classifier.bias, value)
    with pytest.raises(InputError, match=r"the weight classifier\.bias is not finite$"):
        save_checkpoint(tmp_path / "new", Checkpoint(model, LANGUAGES, INFO), dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"hidden_size": 5000}, "the option hidden_size cannot be 5000"),
        ({"hidden_size": 10**9}, "the option hidden_size cannot be 1000000000"),
        ({"num_layers": 65}, "the option num_layers cannot be 65"),
        ({"num_layers": 20}, "80 layers in total: 1 to 64 are allowed"),
        ({"secret": 1}, "there is no option 'secret'"),
        ({"hidden_size": 4096}, "its weights take "),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_trained(recipe, reason):
    with bounded(), pytest.raises(InputError, match=f"^the model cannot be saved: {reason}"):
        fit(split(embedded_sample()), Recipe(members=4, model=recipe))


@pytest.mark.parametrize("junk", ["x" * 2**21, [[]] * 50_000], ids=["text", "lists"])
def test_values_that_are_too_large_are_not_saved(trained, tmp_path, junk):
    odd = replace(trained, info={"junk": junk})
    with pytest.raises(InputError, match=r" bytes would be too large to be read again$"):
        save_checkpoint(tmp_path / "new", odd)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    tensors = {"a": torch.ones(250)}
    monkeypatch.setattr(tensor_files, "MAX_BYTES", 2000)
    tensor_files.write_tensors(tmp_path / "new", "kind", tensors, {})
    monkeypatch.setattr(tensor_files, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match=r" bytes would be too large to be read again$"):
        tensor_files.write_tensors(tmp_path / "new", "kind", tensors, {})


def test_the_limits_allow_large_valid_checkpoints(tmp_path):
    check_loadable([{"hidden_size": 512, "num_layers": 2, "bidirectional": True}] * 10, 18, ASCII)
    languages = tuple(chr(0x20000 + i) * 50 for i in range(MAX_LANGUAGES))
    epochs = [asdict(Epoch(10, i, *[1 / 3] * 5)) for i in range(MAX_EPOCHS)]
    info = {
        "history": epochs,
        "split": {"data": {"source": "\udcff" * 4096}},
        "metrics": {"test_recall": dict.fromkeys(languages, 1 / 3)},
    }
    largest = Checkpoint(NameClassifier(MAX_LANGUAGES, 1, 1), languages, info)
    save_checkpoint(tmp_path / "largest", largest)
    assert load_checkpoint(tmp_path / "largest").info == info


@pytest.mark.parametrize(
    ("info", "kind", "value"),
    [
        ({"a": {"b": 1}}, int, 1),
        ({"a": {"b": 1}}, float, 1),
        ({"a": {"b": True}}, bool, True),
        ({"a": {"b": True}}, int, None),
        ({"a": {"b": None}}, float, None),
        ({"a": [1]}, int, None),
        (None, int, None),
    ],
)
def test_a_recorded_value_of_the_wrong_type_counts_as_missing(info, kind, value):
    assert recorded(info, kind, "a", "b") is value
