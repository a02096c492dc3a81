"""Training the classifier: the split of the data, and the loop."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from namernn_fast import FusedRNN

from .dataset import NamesData
from .files import require
from .model import NameClassifier
from .text import EncodedNames, InputError, encode_names, fold

_EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class LabelledNames:
    """Encoded names with their languages."""

    names: EncodedNames
    labels: Tensor
    """int64 (number of names), the index of each name's language"""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch: losses are means over names, accuracies fractions of names.

    The training figures are gathered while the weights change, the held-out figures at the end.
    """

    number: int
    train_loss: float
    train_accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float
    """The time of the training steps alone."""

    def __str__(self) -> str:
        return (
            f"epoch {self.number}: "
            f"train loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.1%}; "
            f"held-out loss {self.held_out_loss:.4f}, accuracy {self.held_out_accuracy:.1%}; "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Fit:
    """A trained model, the languages that its outputs stand for, and the results of its epochs."""

    model: NameClassifier
    languages: tuple[str, ...]
    history: tuple[Epoch, ...]


def split(
    data: NamesData, *, held_out: float = 0.2, seed: int = 0
) -> tuple[LabelledNames, LabelledNames]:
    """Splits the names into a training and a held-out set.

    Within each language the distinct folded names are shuffled, and the fraction `held_out` of
    them, rounded, at least one and never all, is held out. So a repeated row counts once, in one
    set, and every language with two names is in both sets. A string under two languages is two
    names.

    Args:
        data: the names.
        held_out: a fraction between 0 and 1, both excluded.
        seed: of the shuffling.

    Returns:
        The training set and the held-out set.

    Raises:
        InputError: held_out is another number, or no language has two names.
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
    """Yields (names, labels) of each batch.

    Inside a batch the names are sorted from the longest to the shortest, labels alongside, so that
    the packed batch needs no reordering.

    Args:
        data: the names.
        order: int64 (number of names), the indices of the names in the order of the batches.
        batch_size: names in a batch; the last batch may have fewer.
        device: of the results.
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
    """Takes one step of the optimizer on the mean cross-entropy of a batch.

    Args:
        model: the classifier.
        optimizer: of its parameters.
        names: a packed batch of character ids.
        labels: int64 (batch), the languages of the names.
        clip_norm: the largest norm that the gradient may have; None does not clip.

    Returns:
        The loss before the step and the number of names whose language was predicted: scalars on
        the model's device, detached, so that the caller chooses when to wait for them.
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
    """Takes a step on each batch; returns the mean loss and the accuracy over names."""
    model.train()
    count = 0
    results = []
    for names, labels in steps:
        loss, hits = train_step(model, optimizer, names, labels, clip_norm)
        results.append(torch.stack((loss * len(labels), hits)))
        count += len(labels)
    # Fetched once, since reading a number from a GPU waits for the GPU.
    loss_sum, hit_sum = torch.stack(results).cpu().double().sum(0).tolist()
    return loss_sum / count, hit_sum / count


@torch.no_grad()
def evaluate(model: NameClassifier, data: LabelledNames) -> tuple[float, float]:
    """Returns the mean loss and the accuracy on `data`; leaves the model in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    loss = hits = 0.0
    # Sorted by length over all batches, so that the lengths in a batch hardly differ.
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
    """Trains a `NameClassifier` with Adam.

    Args:
        data: the names.
        epochs: passes over the training names.
        batch_size: names in a step.
        lr: the learning rate of Adam.
        seed: fixes the split, the initial weights, the order of the names and the dropout, and so,
            on the CPU with a fixed number of threads, every bit of the result. The caller's random
            state is left as it was.
        held_out: the fraction of names that is not trained on.
        clip_norm: the largest norm that the gradient may have; None does not clip.
        device: where to train.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.
        progress: whether to show a bar (it needs tqdm) where standard error is a terminal.
        report: called with the results of each epoch when the epoch ends.
        model_options: further arguments of `NameClassifier`.

    Returns:
        The trained model with the results of its epochs.

    Raises:
        RuntimeError: the loss stopped being finite.
        ModuleNotFoundError: a bar is asked for and tqdm is not installed.
        InputError: as of `split`.
        ValueError, TypeError: as of `NameClassifier`.
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
