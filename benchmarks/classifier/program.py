"""What all programs have in common: the data, the network's sizes, and what a program can do."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.harness import surnames
from namernn_fast.names import ALPHABET

EMBEDDING, HIDDEN = 64, 256
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Corpus:
    """Surnames as they are written, with their languages."""

    names: Sequence[str]
    labels: Tensor
    """int64 (number of names), indices into `languages`"""
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
    """Returns the parameters that every program starts from, by the names that it has for them."""
    torch.manual_seed(0)
    parts = {
        "embedding": nn.Embedding(len(ALPHABET), EMBEDDING),
        "rnn": nn.RNN(EMBEDDING, HIDDEN),
        "classifier": nn.Linear(HIDDEN, languages),
    }
    return dict(nn.ModuleDict(parts).state_dict())


class Program(ABC):
    """A program that trains the classifier and tells the languages of names.

    Args:
        corpus: the names to train on, which the program may prepare at once.
        weights: the parameters to start from.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = False
    """Whether equal characters share their input product, and equal beginnings of names their
    states."""
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def __init__(self, corpus: Corpus, weights: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def batches(self, order: Tensor, batch_size: int) -> Iterable[Any]:
        """Returns the batches of a stretch of an epoch.

        Args:
            order: int64 (names), which names of the corpus in which order.
            batch_size: names in a batch.
        """

    @abstractmethod
    def train(self, batches: Iterable[Any]) -> tuple[float, float]:
        """Takes a step on each batch; returns the mean loss and the accuracy over names."""

    @abstractmethod
    def label(self, names: Sequence[str]) -> list[str]:
        """Returns the most probable language of each name, given as text."""
