"""The two programs that are timed: the names application, and a user's program with `nn.RNN`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.names.data import Corpus
from namernn_fast.names import (
    ASCII,
    Batch,
    Checkpoint,
    LabelledNames,
    NameClassifier,
    Predictor,
    Recipe,
    batches,
    encode_names,
    train_epoch,
)

EMBEDDING, HIDDEN = 64, 256
LEARNING_RATE = 1e-3
PREDICTION_BATCH = 512
IDS = bytes.maketrans(ASCII.alphabet.encode(), bytes(range(len(ASCII.alphabet))))

Weights = dict[str, Tensor]
Item = tuple[Tensor, int]


class Program(ABC):
    """A program that trains the classifier and predicts the languages of names.

    It may preprocess the names of the corpus, and starts from the given weights.
    """

    name: ClassVar[str]
    shares: ClassVar[bool] = False
    """Whether equal characters share their input product, and common prefixes of names their
    states."""
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def __init__(self, corpus: Corpus, weights: Weights) -> None: ...

    @abstractmethod
    def batches(self, order: Tensor, batch_size: int) -> Iterable[Any]:
        """Returns batches of names, given by their indices in the corpus, int64 `(names,)`."""

    @abstractmethod
    def train(self, batches: Iterable[Any]) -> tuple[float, float]:
        """Takes an optimizer step on each batch; returns the mean loss and the accuracy."""

    @abstractmethod
    def label(self, names: Sequence[str]) -> list[str]:
        """Returns the most probable language of each name."""


class Application(Program):
    """Runs this package's names application through its public functions."""

    name = "application"
    shares = True

    def __init__(self, corpus: Corpus, weights: Weights):
        texts = tuple(ASCII.fold_usable(corpus.names))
        self.data = LabelledNames(texts, encode_names(corpus.names), corpus.labels)
        self.model = NameClassifier(len(corpus.languages), EMBEDDING, HIDDEN)
        self.model.load_state_dict(weights)
        self.recipe = Recipe(lr=LEARNING_RATE)
        options = {"lr": self.recipe.lr, "weight_decay": self.recipe.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        self.predictor = Predictor(Checkpoint(self.model, corpus.languages, {}))

    def batches(self, order: Tensor, batch_size: int) -> Iterable[Batch]:
        return batches(self.data, order, batch_size)

    def train(self, batches: Iterable[Batch]) -> tuple[float, float]:
        return train_epoch(self.model, self.optimizer, batches, self.recipe)

    def label(self, names: Sequence[str]) -> list[str]:
        self.model.eval()
        return self.predictor.languages_of(names)


class Settings(NamedTuple):
    """Settings that a user would try."""

    workers: int
    """The number of `DataLoader` worker processes."""
    fused: bool
    """Whether Adam is the fused implementation; otherwise it is the `foreach` implementation."""

    def __str__(self) -> str:
        return f"{self.workers} worker(s), {'fused' if self.fused else 'foreach'} Adam"


SETTINGS = tuple(Settings(workers, fused) for workers in (0, 1) for fused in (True, False))


class Names(Dataset[Item]):
    """Encoded names with their labels."""

    def __init__(self, texts: Iterable[str], labels: Iterable[int]):
        self.ids = [torch.tensor([*text.encode().translate(IDS)]) for text in texts]
        self.labels = [*labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        return self.ids[index], self.labels[index]


def pad_and_pack(items: list[Item]) -> tuple[PackedSequence, Tensor]:
    """Returns the packed ids of a batch and its labels, longest name first."""
    items.sort(key=lambda item: len(item[0]), reverse=True)
    ids, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(name) for name in ids])
    return pack_padded_sequence(pad_sequence(list(ids)), lengths), torch.tensor(labels)


class Classifier(nn.Module):
    """`nn.Embedding`, `nn.RNN`, `nn.Linear`."""

    def __init__(self, languages: int):
        super().__init__()
        self.embedding = nn.Embedding(len(ASCII.alphabet), EMBEDDING)
        self.rnn = nn.RNN(EMBEDDING, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, languages)

    def forward(self, names: PackedSequence) -> Tensor:
        _, h_n = self.rnn(names._replace(data=self.embedding(names.data)))
        return self.classifier(h_n[-1])


def starting_weights(languages: int) -> Weights:
    """Returns the initial parameters of both programs, by their names in the model."""
    torch.manual_seed(0)
    return dict(Classifier(languages).state_dict())


class WithTorch(Program):
    """The user's program: `Dataset`, `DataLoader`, `nn.Embedding`, `nn.RNN`.

    It is as fast as a user can write it: names are encoded once, batches are sorted so that
    `nn.RNN` does not reorder states, and the optimizer and the number of workers are the fastest of
    `SETTINGS` on the machine. Only the folding is the application's, because that is faster.
    """

    name = "nn.RNN and DataLoader"

    def __init__(self, corpus: Corpus, weights: Weights, settings: Settings = SETTINGS[0]):
        self.languages = corpus.languages
        self.model = Classifier(len(corpus.languages))
        self.model.load_state_dict(weights)
        options = {"fused": settings.fused, "foreach": not settings.fused}
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE, **options)
        self.indices: list[list[int]] = []  # the batches that the loader makes next
        self.loader = DataLoader(
            Names(ASCII.fold_usable(corpus.names), corpus.labels.tolist()),
            batch_sampler=self.indices,
            num_workers=settings.workers,
            collate_fn=pad_and_pack,
            persistent_workers=settings.workers > 0,
        )

    def batches(self, order: Tensor, batch_size: int) -> DataLoader[Item]:
        self.indices[:] = [indices.tolist() for indices in order.split(batch_size)]
        return self.loader

    def train(self, batches: Iterable[tuple[PackedSequence, Tensor]]) -> tuple[float, float]:
        self.model.train()
        loss_sum = hits = count = 0.0
        for names, labels in batches:
            scores = self.model(names)
            loss = F.cross_entropy(scores, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item() * len(labels)
            hits += (scores.argmax(1) == labels).sum().item()
            count += len(labels)
        return loss_sum / count, hits / count

    def label(self, names: Sequence[str]) -> list[str]:
        return [self.languages[place] for place in self.scores(names).argmax(1).tolist()]

    @torch.inference_mode()
    def scores(self, names: Sequence[str]) -> Tensor:
        """Returns the logits `(names, languages)`, in the order of the names."""
        self.model.eval()
        texts = ASCII.fold_usable(names)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        dataset = Names((texts[index] for index in order), order)
        loader = DataLoader(dataset, PREDICTION_BATCH, collate_fn=pad_and_pack)
        found, places = zip(*((self.model(ids), place) for ids, place in loader), strict=True)
        scores = torch.cat(found)
        return torch.empty_like(scores).index_copy_(0, torch.cat(places), scores)


PROGRAMS: tuple[type[Program], ...] = (WithTorch, Application)
"""The programs, in the order of the tables."""
