"""The program without this package: `Dataset`, `DataLoader`, `nn.Embedding`, `nn.RNN`.

It is as fast as a user can write it: names are encoded once, batches are sorted so that `nn.RNN`
does not reorder states, and the optimizer and the number of workers are the fastest of `SETTINGS`
on the machine.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

from benchmarks.classifier.program import EMBEDDING, HIDDEN, LEARNING_RATE, Corpus, Program
from namernn_fast.names import ASCII
from namernn_fast.names.folding import SPELLINGS

Item = tuple[Tensor, int]

PREDICTION_BATCH = 512
IDS = bytes.maketrans(ASCII.alphabet.encode(), bytes(range(len(ASCII.alphabet))))
KEPT = frozenset(ASCII.alphabet + ASCII.alphabet.upper())
SPELL = str.maketrans(SPELLINGS)
DROP_FROM_ASCII = str.maketrans(
    {code: None for code in range(128) if chr(code) not in KEPT}
    | {ord("`"): "'"}
    | {ord(letter.upper()): letter for letter in ASCII.alphabet if letter.isalpha()}
)


@dataclass(frozen=True)
class Settings:
    """Settings that a user would try."""

    workers: int
    """The number of `DataLoader` worker processes."""
    fused: bool
    """Whether Adam is the fused implementation; otherwise it is the `foreach` implementation."""

    def __str__(self) -> str:
        return f"{self.workers} worker(s), {'fused' if self.fused else 'foreach'} Adam"


SETTINGS = tuple(Settings(workers, fused) for workers in (0, 1) for fused in (True, False))


def fold(name: str) -> str:
    """Folds a single name to a string over the alphabet."""
    if name.isascii():
        return name.translate(DROP_FROM_ASCII).strip()
    spelled = unicodedata.normalize("NFD", name).translate(SPELL)
    return "".join(character for character in spelled if character in KEPT).lower().strip()


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


class Stretch:
    """The batches that a loader makes next, as lists of indices."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


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


class WithTorch(Program):
    """The user's program."""

    name = "nn.RNN and DataLoader"

    def __init__(
        self, corpus: Corpus, weights: dict[str, Tensor], settings: Settings = SETTINGS[0]
    ):
        self.languages = corpus.languages
        self.model = Classifier(len(corpus.languages))
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(),
            LEARNING_RATE,
            fused=settings.fused,
            foreach=not settings.fused,
        )
        self.stretch = Stretch()
        self.loader = DataLoader(
            Names(map(fold, corpus.names), corpus.labels.tolist()),
            batch_sampler=self.stretch,
            num_workers=settings.workers,
            collate_fn=pad_and_pack,
            persistent_workers=settings.workers > 0,
        )

    def batches(self, order: Tensor, batch_size: int) -> DataLoader[Item]:
        self.stretch.indices = [indices.tolist() for indices in order.split(batch_size)]
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
        texts = [fold(name) for name in names]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        dataset = Names((texts[index] for index in order), order)
        loader = DataLoader(dataset, PREDICTION_BATCH, collate_fn=pad_and_pack)
        found, places = zip(*((self.model(ids), place) for ids, place in loader), strict=True)
        scores = torch.cat(found)
        return torch.empty_like(scores).index_copy_(0, torch.cat(places), scores)
