"""Checkpoints: what they bring back, and what damaged and hostile files lead to."""

import errno

import pytest
import torch
from torch import nn

from namernn_fast import FusedRNN
from namernn_fast.names import (
    InputError,
    Predictor,
    Recipe,
    fit,
    load_checkpoint,
    save_checkpoint,
    split,
    tensor_files,
)
from namernn_fast.names.dataset import embedded_sample

SMALL = {"embedding_size": 8, "hidden_size": 12, "bidirectional": True, "num_layers": 2}


@pytest.fixture(scope="module")
def saved():
    return fit(
        split(embedded_sample()), Recipe(epochs=1, model={**SMALL, "dropout": 0.2})
    ).checkpoint


@pytest.mark.parametrize("rnn_class", [FusedRNN, nn.RNN])
def test_a_checkpoint_brings_the_model_back(saved, tmp_path, rnn_class):
    path = tmp_path / "new" / "names.safetensors"
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path, rnn_class=rnn_class)
    assert list(path.parent.iterdir()) == [path]
    assert loaded.languages == saved.languages
    assert loaded.info == saved.info
    assert type(loaded.model.rnn) is rnn_class
    assert loaded.model.config == saved.model.config
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    for name, value in saved.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    if rnn_class is FusedRNN:
        ours, theirs = (Predictor(each).probabilities(["Kim"]) for each in (loaded, saved))
        assert torch.equal(ours, theirs)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(saved, tmp_path, monkeypatch):
    path = tmp_path / "names.safetensors"
    path.write_bytes(b"the old one")
    replacing = tensor_files.replacing

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.file.write(content[:9])
            raise OSError(errno.ENOSPC, "No space left on device")

    class Replacing:
        def __init__(self, path):
            self.context = replacing(path)

        def __enter__(self):
            return Full(self.context.__enter__())

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(tensor_files, "replacing", Replacing)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, saved)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def refusal(path):
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    start, _, rest = str(error.value).partition(": ")
    assert start == str(path)
    return rest


def test_no_checkpoint(tmp_path):
    assert refusal(tmp_path / "none") == "there is no such file"
    assert refusal(tmp_path) == "not a plain file"


def test_a_damaged_checkpoint(saved, tmp_path):
    path = tmp_path / "names.safetensors"
    save_checkpoint(path, saved)
    whole = path.read_bytes()
    for content in (b"", b"text\n", whole[: len(whole) // 2], whole[:-1], whole[100:]):
        path.write_bytes(content)
        assert refusal(path).startswith("not a readable safetensors file (")
