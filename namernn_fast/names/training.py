"""Training the classifier: the split, the loop, and checkpoints."""

from __future__ import annotations

import io
import math
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN

from .data import NamesData, cache_folder, replacing, require
from .model import NameClassifier
from .text import ALPHABET, EncodedNames, InputError, encode_names, fold

_FORMAT = "namernn_fast.names 1"
_EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class LabelledNames:
    """Encoded names, and their languages: int64, (number of names)."""

    names: EncodedNames
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: losses are means over names, accuracies fractions of names.

    The training figures are gathered while the weights move, the held-out ones at the end.
    `seconds` is the time of the training alone.
    """

    number: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.number}: "
            f"train loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.1%}; "
            f"held-out loss {self.held_out_loss:.4f}, accuracy {self.held_out_accuracy:.1%}; "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Fit:
    """A trained model, the languages its outputs stand for, and the epochs that led to it."""

    model: NameClassifier
    languages: tuple[str, ...]
    history: tuple[Epoch, ...]


def split(
    data: NamesData, *, held_out: float = 0.2, seed: int = 0
) -> tuple[LabelledNames, LabelledNames]:
    """Split the names into a training and a held-out set.

    The rule: within each language the distinct folded names are shuffled, and the first
    `held_out` of them, rounded, at least one and never all, are held out. So a repeated row counts
    once, on one side, and every language with two names is on both. The same string under two
    languages is two names.

    held_out: a fraction between 0 and 1, ends excluded.

    Raises InputError for another fraction, and when no language has two names.
    """
    if not 0 < held_out < 1:
        raise InputError(f"the held-out share must be between 0 and 1, not {held_out}")
    by_language: defaultdict[int, set[str]] = defaultdict(set)
    for name, language in data.rows:
        by_language[language].add(fold(name))
    generator = torch.Generator().manual_seed(seed)
    train: list[tuple[str, int]] = []
    held: list[tuple[str, int]] = []
    for language, distinct in sorted(by_language.items()):
        names = sorted(distinct)
        order = torch.randperm(len(names), generator=generator).tolist()
        shuffled = [(names[index], language) for index in order]
        count = min(max(round(held_out * len(names)), 1), len(names) - 1)
        held += shuffled[:count]
        train += shuffled[count:]
    if not held:
        raise InputError(f"{data.source}: too few names to hold any out")
    return _labelled(train), _labelled(held)


def _labelled(rows: list[tuple[str, int]]) -> LabelledNames:
    names, labels = zip(*rows, strict=True)
    return LabelledNames(encode_names(names), torch.tensor(labels))


def batches(
    data: LabelledNames, order: Tensor, batch_size: int, device: str | torch.device = "cpu"
) -> Iterable[tuple[PackedSequence, Tensor]]:
    """Yield (names, labels) on `device`, batch by batch, in `order`, int64, (number of names).

    Inside a batch the names go from the longest to the shortest, labels alongside, so that the
    packed batch needs no reordering.
    """
    for indices in order.split(batch_size):
        indices = data.names.by_length(indices)
        yield data.names.pack(indices, device), data.labels[indices].to(device)


def train_step(
    model: NameClassifier,
    optimizer: torch.optim.Optimizer,
    names: PackedSequence,
    labels: Tensor,
    clip_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step of the optimizer on the mean cross-entropy of a batch.

    Returns the loss and the number of names told rightly, before the step: scalars on the model's
    device, detached, so that the caller chooses when to wait for them.
    """
    logits = model(names)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def train_epoch(
    model: NameClassifier,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[tuple[PackedSequence, Tensor]],
    clip_norm: float | None = None,
) -> tuple[float, float]:
    """Take a step on each batch of `steps`; return the mean loss and the accuracy over names."""
    model.train()
    count = 0
    results = []
    for names, labels in steps:
        loss, hits = train_step(model, optimizer, names, labels, clip_norm)
        results.append(torch.stack((loss * len(labels), hits)))
        count += len(labels)
    # Fetched once: reading a number from a GPU waits for it.
    loss_sum, hit_sum = torch.stack(results).cpu().double().sum(0).tolist()
    return loss_sum / count, hit_sum / count


@torch.no_grad()
def evaluate(model: NameClassifier, data: LabelledNames) -> tuple[float, float]:
    """Return the mean loss and the accuracy on `data`; leaves the model in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    loss = hits = 0.0
    # From the longest name to the shortest overall, so that batches hardly differ in length.
    order = data.names.by_length(torch.arange(len(data)))
    for names, labels in batches(data, order, _EVALUATION_BATCH, device):
        logits = model(names)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += (logits.argmax(1) == labels).sum().item()
    return loss / len(data), hits / len(data)


def fit(
    data: NamesData,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    held_out: float = 0.2,
    clip_norm: float | None = None,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
    progress: bool = False,
    report: Callable[[Epoch], None] | None = None,
    **model_options: Any,
) -> Fit:
    """Train a `NameClassifier` with Adam and return it with the history of its epochs.

    seed: fixes the split, the initial weights, the order of the names and the dropout, and so, on
        the CPU and with the same number of threads, every bit of the result. The caller's random
        state is left as it was.
    held_out: the fraction of names that is not trained on.
    clip_norm: the largest norm that the gradient may have; None does not clip.
    progress: whether to show a bar (it needs tqdm) where standard error is a terminal.
    report: called with each epoch when it ends.
    model_options: further arguments of `NameClassifier`.

    Raises RuntimeError when the loss stops being finite, ModuleNotFoundError when a bar is asked
    for and tqdm is not installed, and what `split` and `NameClassifier` raise.
    """
    device = torch.device(device)
    train, held = split(data, held_out=held_out, seed=seed)
    shuffle = torch.Generator().manual_seed(seed)
    history = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = NameClassifier(len(data.languages), rnn_class=rnn_class, **model_options)
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for number in range(1, epochs + 1):
            order = torch.randperm(len(train), generator=shuffle)
            steps = batches(train, order, batch_size, device)
            if progress:
                total = math.ceil(len(train) / batch_size)
                steps = _with_bar(steps, total, f"epoch {number}/{epochs}")
            started = time.perf_counter()
            loss, accuracy = train_epoch(model, optimizer, steps, clip_norm)
            seconds = time.perf_counter() - started
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss became {loss} in epoch {number}: try a smaller learning rate"
                )
            history.append(Epoch(number, loss, accuracy, *evaluate(model, held), seconds))
            if report is not None:
                report(history[-1])
    return Fit(model, data.languages, tuple(history))


def _with_bar(steps: Iterable[Any], total: int, title: str) -> Iterable[Any]:
    bar: Iterable[Any] = require("tqdm").tqdm(
        steps, title, total, unit="batch", leave=False, disable=None
    )
    return bar


def default_checkpoint() -> Path:
    """Return where `train` saves and `predict` looks when no path is named."""
    return cache_folder() / "names.pt"


def save_checkpoint(path: str | os.PathLike[str], fitted: Fit) -> None:
    """Save the model with what is needed to use it; `path` is replaced only by a whole file.

    Raises InputError when `path` is there and is not a plain file, OSError when the disk fails.
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
    """Return the model saved at `path`, in evaluation mode, and its languages.

    Only tensors and plain values are read, never code. Raises InputError when there is no
    checkpoint, or something else, and OSError when the disk fails.
    """
    path = Path(path)
    advice = "run `python -m namernn_fast.names train` first"
    if not path.is_file():
        raise InputError(f"{path}: there is no checkpoint here; {advice}")
    # Read apart, so that the disk's errors are not taken for torch's complaints about the content.
    saved = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(saved, map_location="cpu", weights_only=True)
        model, languages = _restore(content, rnn_class)
    # Foreign bytes fail in too many ways to list; what failed stays on as the cause.
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of namernn_fast.names; {advice}") from error
    return model.to(device).eval(), languages


def _restore(content: Any, rnn_class: type[nn.RNN]) -> tuple[NameClassifier, tuple[str, ...]]:
    if not isinstance(content, dict):
        raise TypeError("not a dictionary")
    if (content["format"], content["alphabet"]) != (_FORMAT, ALPHABET):
        raise ValueError("another format")
    languages = tuple(content["languages"])
    if not all(isinstance(language, str) and language.isprintable() for language in languages):
        raise ValueError("odd languages")
    # Without memory, so that an odd configuration fails on the weights' shapes, not on their size.
    with torch.device("meta"):
        model = NameClassifier(len(languages), rnn_class=rnn_class, **content["config"])
    weights = content["state_dict"]
    if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
        raise ValueError("odd weights")
    model.load_state_dict(weights, assign=True)
    return model, languages
