"""The data, the network's sizes and the interface that all programs share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.harness import surnames
from namernn_fast.names import ASCII

EMBEDDING, HIDDEN = 64, 256
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Corpus:
    """Surnames as written, with their languages."""

    names: Sequence[str]
    labels: Tensor
    """int64 `(names,)`: indices into `languages`"""
    languages: tuple[str, ...]

    @classmethod
    def of_data(cls, most: int | None = None) -> "Corpus":
        """Returns the data set, or `most` of its names, drawn at random."""
        data = surnames.names()
        order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(0))
        rows = [data.rows[index] for index in order[:most].tolist()]
        labels = torch.tensor([label for _, label in rows])
        return cls([name for name, _ in rows], labels, data.languages)


def starting_weights(languages: int) -> dict[str, Tensor]:
    """Returns the initial parameters of every program, by their names in the model."""
    torch.manual_seed(0)
    parts = {
        "embedding": nn.Embedding(len(ASCII.alphabet), EMBEDDING),
        "rnn": nn.RNN(EMBEDDING, HIDDEN),
        "classifier": nn.Linear(HIDDEN, languages),
    }
    return dict(nn.ModuleDict(parts).state_dict())


class Program(ABC):
    """A program that trains the classifier and predicts the languages of names.

    Args:
        corpus: The names to train on, which the program may preprocess.
        weights: The initial parameters.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = False
    """Whether equal characters share their input product, and common prefixes of names their
    states."""
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def __init__(self, corpus: Corpus, weights: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def batches(self, order: Tensor, batch_size: int) -> Iterable[Any]:
        """Returns the batches of a stretch of an epoch.

        Args:
            order: int64 `(names,)`: indices into the corpus, in training order.
            batch_size: Names per batch.
        """

    @abstractmethod
    def train(self, batches: Iterable[Any]) -> tuple[float, float]:
        """Takes an optimizer step on each batch; returns the mean loss and the accuracy."""

    @abstractmethod
    def label(self, names: Sequence[str]) -> list[str]:
        """Returns the most probable language of each name."""
