"""The names application as it was before it knew of token ids, and its shortcuts one by one.

The code is that of `namernn_fast.names` at the revision that first had a pretrained network, cut
down to what the plain network needs. It is frozen: it must not follow the application, because it
is what the application is compared with.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.classifier.program import EMBEDDING, HIDDEN, LEARNING_RATE, Corpus, Program
from namernn_fast import FusedRNN
from namernn_fast.names import ALPHABET
from namernn_fast.names.text import MAX_NAME_LENGTH, SPELLINGS

BATCH_CHARACTERS = 16_384
"""The most characters of a batch in prediction, padding included."""

KEPT = frozenset(ALPHABET + ALPHABET.upper())
SPELL = str.maketrans(SPELLINGS)
DROP_FROM_ASCII = str.maketrans(
    {code: None for code in range(128) if chr(code) not in KEPT}
    | {ord("`"): "'"}
    | {ord(letter.upper()): letter for letter in ALPHABET if letter.isalpha()}
)
IDS = bytes.maketrans(ALPHABET.encode(), bytes(range(len(ALPHABET))))


def fold(name: str) -> str:
    """Returns `name` as a string over the alphabet."""
    if name.isascii():
        return name.translate(DROP_FROM_ASCII).strip()
    spelled = unicodedata.normalize("NFD", name).translate(SPELL)
    return "".join(character for character in spelled if character in KEPT).lower().strip()


class EncodedNames(NamedTuple):
    """Names as one run of character ids."""

    characters: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, names: Iterable[str]) -> "EncodedNames":
        """Folds and encodes names, each by itself."""
        texts = []
        for name in names:
            text = fold(name) if len(name) <= MAX_NAME_LENGTH else ""
            if not text:
                raise ValueError(f"an unusable name: {name!r}")
            texts.append(text)
        ids = bytearray("".join(texts).encode("ascii").translate(IDS))
        lengths = torch.tensor([len(text) for text in texts])
        characters = torch.frombuffer(ids, dtype=torch.uint8).long()
        return cls(characters, lengths.cumsum(0) - lengths, lengths)

    def by_length(self, indices: Tensor) -> Tensor:
        """Returns `indices` sorted from the longest name to the shortest."""
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]

    def pack(self, indices: Tensor) -> PackedSequence:
        """Returns names as a packed batch of character ids."""
        lengths, order = self.lengths[indices].sort(descending=True, stable=True)
        starts = self.starts[indices][order]
        steps = torch.arange(int(lengths[0])).unsqueeze(1)
        present = steps < lengths
        data = self.characters[(steps + starts)[present]]
        batch_sizes = present.sum(1)
        in_order = torch.equal(order, torch.arange(len(order)))
        return PackedSequence(data, batch_sizes, None if in_order else order)


class Batch(NamedTuple):
    """The names of one step."""

    names: PackedSequence
    targets: Tensor


class Classifier(nn.Module):
    """`nn.Embedding`, `FusedRNN` on embedded characters, `nn.Linear`."""

    def __init__(self, languages: int):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), EMBEDDING)
        self.rnn = FusedRNN(EMBEDDING, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, languages)

    def forward(self, names: PackedSequence) -> Tensor:
        h_n = self._last_state(names)
        return self.classifier(h_n[-1:].transpose(0, 1).flatten(1))

    def _last_state(self, names: PackedSequence) -> Tensor:
        _, h_n = self.rnn(names._replace(data=self.embedding(names.data)))
        return h_n


class Before(Program):
    """The application as it was."""

    name = "application before"
    classifier: type[Classifier] = Classifier

    def __init__(self, corpus: Corpus, weights: dict[str, Tensor]):
        self.languages = corpus.languages
        self.encoded = EncodedNames.of(corpus.names)
        self.labels = corpus.labels
        self.model = self.classifier(len(corpus.languages))
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        for indices in order.split(batch_size):
            indices = self.encoded.by_length(indices)
            yield Batch(self.encoded.pack(indices), self.labels[indices])

    def train(self, batches: Iterable[Batch]) -> tuple[float, float]:
        self.model.train()
        results = []
        for batch in batches:
            scores = self.model(batch.names)
            loss = F.cross_entropy(scores, batch.targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss, scores = loss.detach(), scores.detach()
            hits = (scores.argmax(1) == batch.targets).sum()
            count = len(batch.targets)
            results.append(torch.stack([loss * count, hits, torch.full_like(loss, count)]))
        loss_sum, hit_sum, count_sum = torch.stack(results).double().sum(0).tolist()
        return loss_sum / count_sum, hit_sum / count_sum

    def label(self, names: Sequence[str]) -> list[str]:
        probabilities = self.scores(names).softmax(1)
        if not probabilities.isfinite().all():
            raise ValueError("probabilities that are not finite")
        values, places = probabilities.topk(1)
        answers = [
            [(self.languages[place], value) for place, value in zip(*answer, strict=True)]
            for answer in zip(places.tolist(), values.tolist(), strict=True)
        ]
        return [answer[0][0] for answer in answers]

    @torch.no_grad()
    def scores(self, names: Sequence[str]) -> Tensor:
        """Returns the logits (number of names, languages), in the order of the names."""
        self.model.eval()
        encoded = EncodedNames.of(names)
        order = encoded.by_length(torch.arange(len(names)))
        results = torch.cat(
            [self.model(encoded.pack(indices)) for indices in _bounded_batches(encoded, order)]
        )
        restored = torch.empty_like(results)
        restored[order] = results
        return restored


def _bounded_batches(names: EncodedNames, order: Tensor) -> Iterator[Tensor]:
    """Cuts `order`, sorted from the longest name, so that no batch has too many characters."""
    begin = 0
    while begin < len(order):
        longest = int(names.lengths[order[begin]])
        end = begin + max(BATCH_CHARACTERS // longest, 1)
        yield order[begin:end]
        begin = end
