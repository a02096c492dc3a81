"""Checkpoints of the classifier: saving it, and loading it without trusting the file.

A checkpoint is one safetensors file. Its plain values tell everything but the weights: the alphabet
and the version of the folding, the languages, the options of the model, and what `Checkpoint.info`
lists.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from namernn_fast import FusedRNN

from .files import cache_folder
from .model import NameClassifier, NameEnsemble
from .tensor_files import read_tensors, read_values, write_tensors
from .text import ALPHABET, FOLDING_VERSION, InputError

KIND = "namernn_fast.names checkpoint 2"

# Bounds on what a file may ask for, far above any use and far below any harm.
_LARGEST = {"embedding_size": 4096, "hidden_size": 4096, "num_layers": 16}
_MAX_LANGUAGES = 1000
_MAX_MEMBERS = 64
_DTYPES = (torch.float32, torch.float16)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, what its outputs stand for, and where it comes from."""

    model: NameClassifier | NameEnsemble
    languages: tuple[str, ...]
    """What the outputs of the model stand for."""
    info: dict[str, Any]
    """Plain values: "split" (its method, seed, shares and SHA-256, and the data's source, SHA-256
    and rows), "recipe", "seed", "history" (results of the epochs), "versions"."""

    def is_sample(self) -> bool:
        """Returns whether the model was trained on the small embedded sample."""
        return _is_sample(self.info)


def default_checkpoint() -> Path:
    """Returns the path where `train` saves a model when no path is given.

    Raises:
        InputError: the user has no home folder.
    """
    return cache_folder() / "names.safetensors"


def pretrained_checkpoint() -> Path:
    """Returns the path of the small model that comes with the package."""
    return Path(__file__).with_name("pretrained") / "names.safetensors"


def versions() -> dict[str, str]:
    """Returns the versions of what a model is made by."""
    return {
        "namernn_fast": metadata.version("namernn_fast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(
    path: str | os.PathLike[str], checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> None:
    """Saves a model.

    Args:
        path: replaced only by a whole file.
        checkpoint: the model with its languages and origin.
        dtype: of the weights in the file, float32 or float16.

    Raises:
        InputError: `path` exists and is not a plain file.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    model = checkpoint.model
    values = {
        "alphabet": ALPHABET,
        "folding": FOLDING_VERSION,
        "languages": list(checkpoint.languages),
        "model": model.config,
        **checkpoint.info,
    }
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    write_tensors(path, KIND, weights, values)


def describe_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the plain values of the checkpoint at `path`, without its weights.

    Raises:
        InputError, OSError, ModuleNotFoundError: as of `load_checkpoint`.
    """
    values = read_values(path, KIND)
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a checkpoint")
    return values


def check_worth_replacing(path: Path, is_sample: bool) -> None:
    """Raises an error where a new model at `path` would destroy something better.

    Args:
        path: where the new model goes.
        is_sample: whether the new model is trained on the embedded sample.

    Raises:
        InputError: there is a file that is no checkpoint, or a model of real data that a model of
            the sample would replace.
    """
    if not path.exists():
        return
    try:
        replaced = describe_checkpoint(path)
    except InputError as error:
        raise InputError(f"{error}; --force replaces it") from error
    if is_sample and not _is_sample(replaced):
        raise InputError(
            f"{path}: a model of real data, which a model of the embedded sample would replace; "
            "--force replaces it, --checkpoint saves the new model elsewhere"
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
) -> Checkpoint:
    """Loads a model. The file is bounded in size and holds no code.

    Args:
        path: of the checkpoint.
        device: of the model.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.

    Returns:
        The model, float32 and in evaluation mode, with its languages and origin.

    Raises:
        InputError: there is no file at `path`, or it is no checkpoint.
        OSError: the disk failed.
        ModuleNotFoundError: safetensors is not installed.
    """
    values = describe_checkpoint(path)
    try:
        languages = _checked_languages(values)
        # On meta, so that the shapes of the weights are known before anything is allocated.
        with torch.device("meta"), _NoNormal():
            model = _built(values["model"], len(languages), rnn_class)
    # A foreign file fails in too many ways to list; the error stays on as the cause.
    except Exception as error:
        raise InputError(
            f"{path}: not a checkpoint that this version can read ({error})"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights, _ = read_tensors(path, KIND, shapes)
    _check_weights(path, weights)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    info = {
        name: value
        for name, value in values.items()
        if name not in ("alphabet", "folding", "languages", "model")
    }
    return Checkpoint(model.to(device).eval(), languages, info)


class _NoNormal(TorchFunctionMode):
    """Leaves alone what `nn.init.normal_` would fill.

    On the meta device that function imports PyTorch's compiler, which takes seconds and 150 MB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _is_sample(values: dict[str, Any]) -> bool:
    try:
        return bool(values["split"]["data"]["is_sample"])
    except (KeyError, TypeError):
        return False


def _checked_languages(values: dict[str, Any]) -> tuple[str, ...]:
    if (values["alphabet"], values["folding"]) != (ALPHABET, FOLDING_VERSION):
        raise ValueError("its names are folded in another way")
    languages = tuple(values["languages"])
    if not all(isinstance(language, str) and language.isprintable() for language in languages):
        raise ValueError("odd languages")
    if not 0 < len(languages) <= _MAX_LANGUAGES:
        raise ValueError(f"{len(languages)} languages, from 1 to {_MAX_LANGUAGES} can be")
    return languages


def _built(config: Any, num_classes: int, rnn_class: type[nn.RNN]) -> NameClassifier | NameEnsemble:
    """Builds a model from the options that a file gives; raises any error if it gives odd ones."""
    if isinstance(config, list):
        if not 0 < len(config) <= _MAX_MEMBERS:
            raise ValueError(f"{len(config)} members, from 1 to {_MAX_MEMBERS} can be")
        return NameEnsemble([_member(member, num_classes, rnn_class) for member in config])
    return _member(config, num_classes, rnn_class)


def _member(config: dict[str, Any], num_classes: int, rnn_class: type[nn.RNN]) -> NameClassifier:
    for option, largest in _LARGEST.items():
        if type(config[option]) is not int or not 0 < config[option] <= largest:
            raise ValueError(f"{option} must be from 1 to {largest}, not {config[option]!r:.50}")
    return NameClassifier(num_classes, rnn_class=rnn_class, **config)


def _check_weights(path: object, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.dtype not in _DTYPES:
            raise InputError(f"{path}: the weight {name} has the dtype {value.dtype}")
        if not value.isfinite().all():
            raise InputError(f"{path}: the weight {name} is not finite")
