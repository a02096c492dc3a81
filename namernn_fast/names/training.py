"""Trains the classifier: one or more networks, in one or more processes."""

from __future__ import annotations

import hashlib
import math
import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from namernn_fast import FusedRNN

from .checkpoint import Checkpoint, check_loadable, versions
from .files import require
from .model import NameClassifier, NameEnsemble
from .prediction import logits
from .recipes import RECIPES, Recipe
from .splitting import Split
from .steps import batches, process, train_epoch, validate
from .unusual import fit_unusualness


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch. Losses are means over names, and accuracies are fractions.

    Training results are collected while the weights change; validation results are computed at the
    end of the epoch.
    """

    member: int
    """The number of the network that was trained, from 1."""
    number: int
    """The number of the epoch, from 1."""
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float
    """The time that the training steps took, without the validation."""

    def __str__(self) -> str:
        return (
            f"epoch {self.number}: "
            f"train loss {self.train_loss:.4f}, accuracy {self.train_accuracy:.1%}; "
            f"validation loss {self.validation_loss:.4f}, accuracy {self.validation_accuracy:.1%}; "
            f"{self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class Fit:
    """A trained model, and the results of its training epochs."""

    checkpoint: Checkpoint
    """The model, its languages and its origin, as `save_checkpoint` saves them."""
    history: tuple[Epoch, ...]


def read_epochs(history: Any) -> list[Epoch]:
    """Returns the epochs in `history`, a list of dicts that a file records.

    Raises:
        TypeError, ValueError: `history` is empty, or an epoch is invalid.
    """
    epochs = [Epoch(**values) for values in history]
    kinds = [*typing.get_type_hints(Epoch).values()]
    for epoch in epochs:
        values = [*asdict(epoch).values()]
        # 1e9 is far above realistic losses, and figures can still show numbers below 1e9.
        if [*map(type, values)] != kinds or not all(0 <= value < 1e9 for value in values):
            raise ValueError("a result of an epoch has the wrong type, or is out of range")
    if not epochs:
        raise ValueError("no epochs")
    return epochs


class _Member:
    """One network in training, from its first epoch to its last."""

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        seed: int,
        number: int,
        device: torch.device,
        rnn_class: type[nn.RNN],
    ) -> None:
        self.split, self.recipe, self.device = split, recipe, device
        self.seed, self.number = seed, number
        self.history: list[Epoch] = []
        self.rank, self.processes = process()
        torch.manual_seed(self._drawn("weights"))
        model = NameClassifier(
            len(split.languages),
            rnn_class=rnn_class,
            alphabet_size=len(split.folding.alphabet),
            **recipe.model,
        )
        self.model = model.to(device)
        self.trained: nn.Module = self.model
        if self.processes > 1:
            self.trained = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.steps = math.ceil(len(split.train) / recipe.batch_size)
        self.scheduler = self._scheduler()
        self.best: dict[str, Tensor] = {}

    def run_epoch(self, progress: bool) -> Epoch:
        """Runs one epoch and returns its results; keeps the weights if they are the best so far."""
        number = len(self.history) + 1
        shuffle = torch.Generator().manual_seed(self._drawn(f"order {number}"))
        order = torch.randperm(len(self.split.train), generator=shuffle)
        # Each process and epoch gets a different seed, so that dropout differs between processes.
        torch.manual_seed(self._drawn(f"dropout {number} {self.rank}"))
        steps: Iterable[Any] = batches(
            self.split.train,
            order,
            self.recipe.batch_size,
            self.device,
            rank=self.rank,
            processes=self.processes,
        )
        if progress and self.rank == 0:
            title = f"epoch {number}/{self.recipe.epochs}"
            steps = require("tqdm").tqdm(
                steps, title, self.steps, unit="batch", leave=False, disable=None
            )
        started = time.perf_counter()
        loss, accuracy = train_epoch(
            self.trained, self.optimizer, steps, self.recipe, self.scheduler
        )
        seconds = time.perf_counter() - started
        validation_loss, validation_accuracy = validate(self.model, self.split.validation)
        # If the last step of the epoch made the model diverge, only the validation loss shows it.
        for value in (loss, validation_loss):
            if not math.isfinite(value):
                raise RuntimeError(
                    f"the loss became {value} in epoch {number}: try a smaller learning rate"
                )
        if all(validation_accuracy > epoch.validation_accuracy for epoch in self.history):
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
        epoch = Epoch(
            member=self.number,
            number=number,
            train_loss=loss,
            train_accuracy=accuracy,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
            seconds=seconds,
        )
        self.history.append(epoch)
        return epoch

    def _scheduler(self) -> LRScheduler | None:
        """Returns the learning-rate schedule, or None if the rate is constant."""
        if self.recipe.schedule == "constant":
            return None
        return OneCycleLR(
            self.optimizer,
            self.recipe.lr,
            total_steps=self.recipe.epochs * self.steps,
            cycle_momentum=False,
        )

    def _drawn(self, purpose: str) -> int:
        """Returns a seed for one purpose, independent of the seeds for other purposes."""
        text = f"{self.seed} {self.number} {purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def fit(
    split: Split,
    recipe: Recipe = RECIPES["plain"],
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    rnn_class: type[nn.RNN] = FusedRNN,
    progress: bool = False,
    report: Callable[[Epoch], None] | None = None,
) -> Fit:
    """Trains one or more networks, and keeps the weights of each network's best epoch.

    The best epoch is the first with the highest validation accuracy.

    If `torch.distributed` is initialised, its processes divide each batch, and every one returns
    the same model. Apart from dropout and rounding, a single process would return the same model.

    Args:
        split: the training, validation and test sets.
        recipe: how to build and train the networks.
        seed: the seed of the initial weights, the order of the names and the dropout. On the CPU,
            with a fixed number of threads, the seed determines every bit of the result. The
            caller's random state does not change.
        device: the device to train on.
        rnn_class: `FusedRNN`, or `torch.nn.RNN` for comparison.
        progress: whether to show a progress bar, which needs tqdm, if standard error is a terminal.
        report: a function that is called with the results of each epoch when the epoch ends.

    Raises:
        RuntimeError: the loss became infinite or NaN.
        InputError: the recipe's model is invalid or could not be loaded again from a file.
        ModuleNotFoundError: progress is true and tqdm is not installed.
    """
    device = torch.device(device)
    check_loadable([recipe.model] * recipe.members, len(split.languages), split.folding)
    history: list[Epoch] = []
    members: list[NameClassifier] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number in range(1, recipe.members + 1):
            member = _Member(split, recipe, seed, number, device, rnn_class)
            for _ in range(recipe.epochs):
                epoch = member.run_epoch(progress)
                if report is not None:
                    report(epoch)
            history += member.history
            member.model.load_state_dict(member.best)
            members.append(member.model)
    model = members[0] if recipe.members == 1 else NameEnsemble(members)
    model.eval()
    _favour_rare_languages(members, split, recipe)
    loss, accuracy = validate(model, split.validation)
    info = {
        "trained": datetime.now(timezone.utc).date().isoformat(),
        "split": split.info,
        "recipe": recipe.values(),
        "seed": seed,
        "metrics": {
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "test_accuracy": validate(model, split.test)[1],
            "test_recall": _recalls(model, split),
        },
        "history": [asdict(epoch) for epoch in history],
        "versions": versions(),
    }
    checkpoint = Checkpoint(model, split.languages, info, split.folding, fit_unusualness(split))
    return Fit(checkpoint, tuple(history))


def _recalls(model: nn.Module, split: Split) -> dict[str, float | None]:
    """Returns each language's recall on the test set; None for a language without test names."""
    labels = split.test.labels
    right = labels[logits(model, split.test.names).argmax(1) == labels]
    found, counts = (each.bincount(minlength=len(split.languages)) for each in (right, labels))
    return {
        language: hits / count if count else None
        for language, hits, count in zip(
            split.languages, found.tolist(), counts.tolist(), strict=True
        )
    }


def _favour_rare_languages(members: list[NameClassifier], split: Split, recipe: Recipe) -> None:
    """Subtracts the prior correction from the biases of the linear layers, in place.

    An ensemble averages its members' logits, so the ensemble's logits are corrected as well.
    """
    correction = recipe.prior_correction * split.log_priors()
    with torch.no_grad():
        for member in members:
            member.classifier.bias.sub_(correction.to(member.classifier.bias))
