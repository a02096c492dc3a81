"""Saves and loads checkpoints of the classifier. Files are untrusted, so loading validates them.

A checkpoint is one safetensors file. Besides the weights, it contains these plain values: the
folding's alphabet and version, the languages, the model's options, and `Checkpoint.info`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from namernn_fast import FusedRNN, __version__

from .folding import ASCII, MAX_NAME_LENGTH, Folding
from .model import POOLINGS, NameClassifier, NameEnsemble
from .tensor_files import MAX_BYTES, MAX_HEADER_BYTES, read_tensors, read_values, write_tensors
from .text import MAX_LANGUAGES, InputError, is_language
from .unusual import SHARE, SYMBOLS, Unusualness

KIND = "namernn_fast.names checkpoint 2"

PRETRAINED = "pretrained"
"""The name of the model that comes with the package, accepted instead of a checkpoint's path."""

# Limits for the sizes in a file: far above realistic models, but too low to exhaust memory.
_MAX_SIZE = 4096
_MAX_LAYERS = 64  # of all members together; building more layers takes seconds
_DTYPES = (torch.float32, torch.float16)

_TABLE = "unusual"  # the key of `Unusualness` among the tensors and among the plain values

WEAK_RECALL = 0.2
"""A language is called weak if its recall on the test set is below this value."""

Value = TypeVar("Value")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIZE


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "embedding_size": _is_size,
    "hidden_size": _is_size,
    "num_layers": lambda value: type(value) is int and 0 < value <= _MAX_LAYERS,
    "bidirectional": lambda value: type(value) is bool,
    "nonlinearity": lambda value: value in ("tanh", "relu"),
    "dropout": _is_probability,
    "pooling": lambda value: value in POOLINGS,
    "state_dropout": _is_probability,
    "character_dropout": _is_probability,
    "ngrams": lambda value: type(value) is bool,
}
"""The options of `NameClassifier` that a file may contain, each with a check of its value."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its languages, its folding and the record of its training."""

    model: NameClassifier | NameEnsemble
    languages: tuple[str, ...]
    """The languages, in the order of the model's outputs."""
    info: dict[str, Any]
    """Plain values: "trained" (the UTC date), "split" (its method, seed, fractions and SHA-256, and
    the data's source, SHA-256 and rows), "recipe", "seed", "metrics" (on the validation and the
    test set), "history" (results of the epochs), "versions"."""
    folding: Folding = ASCII
    """The folding that the model was trained with."""
    unusualness: Unusualness = field(default_factory=Unusualness)
    """Measures how unusual a name is; by default, no name is unusual."""

    def is_sample(self) -> bool:
        """Returns whether the model was trained on the small embedded sample."""
        return bool(recorded(self.info, bool, "split", "data", "is_sample"))

    def weak_languages(self) -> frozenset[str]:
        """Returns the languages whose recall on the test set is below `WEAK_RECALL`."""
        recalls = recorded(self.info, dict, "metrics", "test_recall") or {}
        return frozenset(
            language
            for language in self.languages
            if (recall := recorded(recalls, float, language)) is not None and recall < WEAK_RECALL
        )


def recorded(info: object, kind: type[Value], *keys: str) -> Value | None:
    """Returns a value of `Checkpoint.info`, or None if the value is missing or not of type `kind`.

    Checkpoint files are untrusted, so an entry may have any type.

    Args:
        info: the plain values of a checkpoint.
        kind: the type of the value.
        keys: the keys of the nested dicts, such as "split", "data", "rows".
    """
    for key in keys:
        info = info.get(key) if isinstance(info, dict) else None
    # JSON does not distinguish 1 from 1.0.
    kinds = (int, float) if kind is float else (kind,)
    return info if type(info) in kinds else None  # type: ignore[return-value]


def pretrained_checkpoint() -> Path:
    """Returns the path of the small model that comes with the package."""
    return Path(__file__).with_name("pretrained") / "names.safetensors"


def versions() -> dict[str, str]:
    """Returns the versions of namernn_fast, torch and Python, which a checkpoint records."""
    return {
        "namernn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(
    path: str | os.PathLike[str], checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> None:
    """Saves a checkpoint to a file.

    Args:
        path: the file to write, replaced only once the new file is complete.
        checkpoint: the checkpoint to save.
        dtype: the dtype of the weights in the file, float32 or float16.

    Raises:
        InputError: `path` exists and is not a regular file, the model is too large, or a weight is
            not finite in this dtype.
        OSError: the file could not be written.
        ModuleNotFoundError: safetensors is not installed.
    """
    model = checkpoint.model
    values = {
        "alphabet": checkpoint.folding.alphabet,
        "folding": checkpoint.folding.version,
        "languages": list(checkpoint.languages),
        "model": model.config,
        **checkpoint.info,
        _TABLE: {"share": SHARE, "longest": checkpoint.unusualness.longest},
    }
    weights = {**model.state_dict(), _TABLE: checkpoint.unusualness.table}
    weights = {name: value.to(dtype) for name, value in weights.items()}
    _check_weights(path, weights)
    write_tensors(path, KIND, weights, values)


def check_loadable(
    options: Sequence[Mapping[str, Any]], num_languages: int, folding: Folding
) -> None:
    """Raises an InputError if `load_checkpoint` would reject a model with these options."""
    try:
        model = _on_meta([dict(member) for member in options], num_languages, folding, FusedRNN)
    except (TypeError, ValueError) as error:
        raise InputError(f"the model cannot be saved: {error}") from error
    size = sum(4 * value.numel() for value in model.state_dict().values())
    if size > MAX_BYTES - MAX_HEADER_BYTES:
        raise InputError(f"the model cannot be saved: its weights take {size:,} bytes")


def check_worth_replacing(path: Path, is_sample: bool) -> None:
    """Raises an InputError if saving a new model would overwrite a valuable file at `path`.

    A file is valuable if it is not a checkpoint, or if its model was trained on real data and the
    new model was trained only on the embedded sample (`is_sample`).
    """
    if not path.exists():
        return
    try:
        replaced = read_values(path, KIND)
    except InputError as error:
        raise InputError(f"{error}; --force overwrites the file") from error
    if is_sample and not recorded(replaced, bool, "split", "data", "is_sample"):
        raise InputError(
            f"{path}: this model was trained on real data, and the new one only on the embedded "
            "sample; --force overwrites the file, --checkpoint saves the new model elsewhere"
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
) -> Checkpoint:
    """Loads a checkpoint. The size of the file is limited, and its format cannot contain code.

    Args:
        path: the checkpoint.
        device: the device to load the model to.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.

    Returns:
        The checkpoint, with the model in float32 and in evaluation mode.

    Raises:
        InputError: there is no file at `path`, or the file is not a checkpoint.
        OSError: the file could not be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    values = read_values(path, KIND)
    try:
        languages, folding = _checked_languages(values), _checked_folding(values)
        model = _on_meta(values["model"], len(languages), folding, rnn_class)
        longest = values[_TABLE]["longest"]
        if type(longest) is not int or not 0 < longest <= MAX_NAME_LENGTH:
            raise ValueError(f"the length of the longest training name cannot be {longest!r:.50}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a checkpoint that this version can read ({error})"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights = read_tensors(path, KIND, {**shapes, _TABLE: (SYMBOLS,) * 3})
    _check_weights(path, weights)
    weights = {name: value.float() for name, value in weights.items()}
    unusualness = Unusualness(weights.pop(_TABLE), longest)
    model.load_state_dict(weights, assign=True)
    info = {
        name: value
        for name, value in values.items()
        if name not in ("alphabet", "folding", "languages", "model", _TABLE)
    }
    return Checkpoint(model.to(device).eval(), languages, info, folding, unusualness)


class _NoNormal(TorchFunctionMode):
    """Makes `nn.init.normal_` a no-op.

    On the meta device, `normal_` imports PyTorch's compiler, which takes seconds and 150 MB.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _checked_languages(values: dict[str, Any]) -> tuple[str, ...]:
    languages = values["languages"]
    if not isinstance(languages, list) or not all(map(is_language, languages)):
        raise ValueError("its languages are not a list of valid names")
    if not 0 < len(set(languages)) == len(languages) <= MAX_LANGUAGES:
        raise ValueError(f"its languages must be 1 to {MAX_LANGUAGES} distinct names")
    return tuple(languages)


def _checked_folding(values: dict[str, Any]) -> Folding:
    plain, alphabet = ASCII.alphabet, values["alphabet"]
    if not isinstance(alphabet, str) or not alphabet.startswith(plain):
        raise ValueError(f"its alphabet does not start with {plain!r}")
    return Folding(alphabet.removeprefix(plain), values["folding"])


def _on_meta(
    config: Any, num_classes: int, folding: Folding, rnn_class: type[nn.RNN]
) -> NameClassifier | NameEnsemble:
    """Builds a model on the meta device, where weights have shapes but take no memory.

    Raises:
        TypeError, ValueError: an option is invalid or too large.
    """
    members = config if isinstance(config, list) else [config]
    for member in members:
        if not isinstance(member, dict):
            raise TypeError(f"the options of a model must be a dict, not {member!r:.50}")
        for option, value in member.items():
            if option not in _OPTIONS:
                raise ValueError(f"there is no option {option!r:.50}")
            if not _OPTIONS[option](value):
                raise ValueError(f"the option {option} cannot be {value!r:.50}")
    layers = sum(member.get("num_layers", 1) for member in members)
    if not 0 < layers <= _MAX_LAYERS:
        raise ValueError(f"{layers} layers in total: 1 to {_MAX_LAYERS} are allowed")
    with torch.device("meta"), _NoNormal():
        models = [
            NameClassifier(
                num_classes,
                rnn_class=rnn_class,
                alphabet_size=len(folding.alphabet),
                **member,
            )
            for member in members
        ]
        return NameEnsemble(models) if isinstance(config, list) else models[0]


def _check_weights(path: object, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.dtype not in _DTYPES:
            raise InputError(f"{path}: the weight {name} has the dtype {value.dtype}")
        if not value.isfinite().all():
            raise InputError(f"{path}: the weight {name} is not finite")
