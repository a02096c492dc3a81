"""Makes up any number of surnames with the letter statistics of the data.

A Markov chain draws each character from the last three, with the frequencies in the folded names of
the data. Capitals and accents are then added with their frequencies in the data, so that
folding has work to do. All names advance by one character at a time, in torch, so that a million
names take seconds.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from namernn_fast.names import ASCII

ORDER = 3
EDGE = len(ASCII.alphabet)
"""The symbol before the first and after the last character of a name."""
SYMBOLS = len(ASCII.alphabet) + 1
CONTEXTS = SYMBOLS**ORDER
START = CONTEXTS - 1
"""The context before a name: `ORDER` edges, since the edge is the last symbol."""
CHUNK = 1 << 16
"""The number of names that advance together."""


class Imitation:
    """The statistics to imitate: which characters follow each other, and how they are spelled.

    Args:
        names: Surnames as written; none may fold to an empty string.
    """

    def __init__(self, names: Iterable[str]):
        names = [unicodedata.normalize("NFC", name.strip()) for name in names]
        texts = [ASCII.fold(name) for name in names]
        self.longest = max(map(len, texts))
        """The length of the longest name, which limits made-up names."""
        self.following = _following(texts)
        """float64 `(contexts, symbols)`: cumulative counts of symbols that follow a context."""
        self.spellings, self.spelled = _spelled(names, texts)
        """The code points that a symbol is written with, int32 `(2 * symbols, spellings)`, and
        their cumulative counts. The second half of the rows is for the start of a name."""

    def draw(self, count: int, seed: int = 0) -> list[str]:
        """Returns `count` names, which the seed determines."""
        generator = torch.Generator().manual_seed(seed)
        names: list[str] = []
        while len(names) < count:
            ids = self._ids(min(CHUNK, count - len(names)), generator)
            first = torch.zeros_like(ids)
            first[:, 0] = SYMBOLS
            kept = (ids == EDGE).cumsum(1) <= 1  # the characters of each name, and one edge
            keys = (ids + first)[kept]
            points = self.spellings[keys, _drawn(self.spelled[keys], generator)]
            names += points.numpy().tobytes().decode("utf-32-le").split("\n")[:-1]
        return names

    def _ids(self, count: int, generator: torch.Generator) -> Tensor:
        """Returns the ids of folded names, int64 `(count, longest + 1)`, padded with edges."""
        ids = torch.full((count, self.longest + 1), EDGE)
        context = torch.full((count,), START)
        rows = torch.arange(count)
        for place in range(self.longest):
            symbols = _drawn(self.following[context[rows]], generator)
            ids[rows, place] = symbols
            context[rows] = (context[rows] * SYMBOLS + symbols) % CONTEXTS
            rows = rows[symbols != EDGE]
        return ids


def _following(texts: Iterable[str]) -> Tensor:
    ids = {character: index for index, character in enumerate(ASCII.alphabet)}
    pairs: list[int] = []
    for text in texts:
        context = START
        for symbol in (*(ids[character] for character in text), EDGE):
            pairs.append(context * SYMBOLS + symbol)
            context = pairs[-1] % CONTEXTS
    counts = torch.bincount(torch.tensor(pairs), minlength=CONTEXTS * SYMBOLS)
    return counts.view(CONTEXTS, SYMBOLS).double().cumsum(1)


def _spelled(names: Iterable[str], texts: Iterable[str]) -> tuple[Tensor, Tensor]:
    counts: list[Counter[str]] = [Counter() for _ in range(2 * SYMBOLS)]
    counts[EDGE]["\n"] = 1
    for name, text in zip(names, texts, strict=True):
        # If folding drops or splits a character, the alignment is unknown.
        if len(name) == len(text):
            for place, (character, folded) in enumerate(zip(name, text, strict=True)):
                counts[ASCII.alphabet.index(folded) + (SYMBOLS if place == 0 else 0)][
                    character
                ] += 1
    most = max(map(len, counts))
    spellings = torch.zeros(2 * SYMBOLS, most, dtype=torch.int32)
    frequencies = torch.zeros(2 * SYMBOLS, most, dtype=torch.float64)
    for key, counter in enumerate(counts):
        # A character that no name has at this position is spelled as itself.
        found = counter or Counter((ASCII.alphabet + "\n")[key % SYMBOLS])
        spellings[key, : len(found)] = torch.tensor([*map(ord, found)])
        frequencies[key, : len(found)] = torch.tensor([*found.values()])
    return spellings, frequencies.cumsum(1)


def _drawn(cumulative: Tensor, generator: torch.Generator) -> Tensor:
    """Draws an index for each row, with probability proportional to its step in `cumulative`."""
    drawn = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).squeeze(1)
