"""Embeddings of n-grams: what stands around a character, for the input of the recurrent layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import ALPHABET

_MARK = len(ALPHABET)  # stands where a name has no character, before its start and past its end
_SYMBOLS = len(ALPHABET) + 1

_TRIGRAM_ROWS = 8192
"""Trigrams share this many rows of a table; about 5,000 are in the names data set."""

# Knuth's multiplicative hash: neighbouring trigrams go to distant rows.
_MULTIPLIER, _DIVISOR = 2_654_435_761, 128


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the n-grams that contain a character.

    They are the bigram that ends at the character, the bigram that begins there, and the trigram
    around it. A mark stands for what is before the start of a name and past its end.

    Args:
        embedding_size: features of each embedding.
        dropout: the probability with which an n-gram's embedding is zeroed in training.
    """

    def __init__(self, embedding_size: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Embedding(_SYMBOLS**2, embedding_size)
        self.after = nn.Embedding(_SYMBOLS**2, embedding_size)
        self.around = nn.Embedding(_TRIGRAM_ROWS, embedding_size)
        self.dropout = dropout
        for table in (self.before, self.after, self.around):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the sums (batch, longest, embedding_size).

        Args:
            ids: int64 (batch, longest), padded character ids.
            lengths: int64 (batch).
        """
        steps = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(steps < lengths.unsqueeze(1), ids, _MARK)
        previous = F.pad(ids[:, :-1], (1, 0), value=_MARK)
        following = F.pad(ids[:, 1:], (0, 1), value=_MARK)
        before = previous * _SYMBOLS + ids
        after = ids * _SYMBOLS + following
        around = (before * _SYMBOLS + following) * _MULTIPLIER // _DIVISOR % _TRIGRAM_ROWS
        return (
            self._dropped(self.before(before))
            + self._dropped(self.after(after))
            + self._dropped(self.around(around))
        )

    def _dropped(self, embedded: Tensor) -> Tensor:
        """Zeroes whole embeddings (batch, longest, embedding_size) in training."""
        return drop_rows(embedded, self.dropout) if self.training else embedded


def drop_rows(rows: Tensor, probability: float) -> Tensor:
    """Zeroes each row (…, features) with a probability, and scales the others accordingly."""
    if probability == 0:
        return rows
    keep = torch.full(rows.shape[:-1], 1 - probability, device=rows.device).bernoulli()
    return rows * (keep / (1 - probability)).unsqueeze(-1)
