"""Checkpoints of the classifier: saving it, and loading it without trusting the file."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from namernn_fast import FusedRNN

from .files import cache_folder, replacing
from .model import NameClassifier
from .text import ALPHABET, InputError
from .training import Fit

_FORMAT = "namernn_fast.names 1"


def default_checkpoint() -> Path:
    """Returns the path where `train` saves and `predict` loads when no path is given."""
    return cache_folder() / "names.pt"


def save_checkpoint(path: str | os.PathLike[str], fitted: Fit) -> None:
    """Saves a trained model with its languages and configuration.

    Args:
        path: replaced only by a whole file.
        fitted: the result of `fit`.

    Raises:
        InputError: `path` exists and is not a plain file.
        OSError: the disk failed.
    """
    content = {
        "format": _FORMAT,
        "alphabet": ALPHABET,
        "languages": list(fitted.languages),
        "config": fitted.model.config,
        "state_dict": {name: value.cpu() for name, value in fitted.model.state_dict().items()},
    }
    with replacing(Path(path)) as file:
        torch.save(content, file)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
) -> tuple[NameClassifier, tuple[str, ...]]:
    """Loads a model. Only tensors and plain values are read, never code.

    Args:
        path: of the checkpoint.
        device: of the model.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.

    Returns:
        The model, in evaluation mode, and its languages.

    Raises:
        InputError: there is no file at `path`, or it is no checkpoint.
        OSError: the disk failed.
    """
    path = Path(path)
    advice = "run `python -m namernn_fast.names train` first"
    if not path.is_file():
        raise InputError(f"{path}: there is no checkpoint here; {advice}")
    # Read beforehand, so that the disk's errors are not taken for errors of the content.
    saved = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(saved, map_location="cpu", weights_only=True)
        model, languages = _restore(content, rnn_class)
    # Foreign bytes fail in too many ways to list; the error stays on as the cause.
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of namernn_fast.names; {advice}") from error
    return model.to(device).eval(), languages


def _restore(content: Any, rnn_class: type[nn.RNN]) -> tuple[NameClassifier, tuple[str, ...]]:
    """Builds the model from the content of a checkpoint; raises any error if it is none."""
    if not isinstance(content, dict):
        raise TypeError("not a dictionary")
    if (content["format"], content["alphabet"]) != (_FORMAT, ALPHABET):
        raise ValueError("another format")
    languages = tuple(content["languages"])
    if not all(isinstance(language, str) and language.isprintable() for language in languages):
        raise ValueError("odd languages")
    # On meta, so that a wrong configuration fails on the shapes of weights, not for lack of memory.
    with torch.device("meta"):
        model = NameClassifier(len(languages), rnn_class=rnn_class, **content["config"])
    weights = content["state_dict"]
    if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
        raise ValueError("odd weights")
    model.load_state_dict(weights, assign=True)
    return model, languages
