"""Embeddings of the n-grams around a character, for the input of the recurrent layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import ALPHABET

_MARK = len(ALPHABET)  # before the start of a name and past its end
_UNKNOWN = len(ALPHABET) + 1
_SYMBOLS = len(ALPHABET) + 2

_TRIGRAM_ROWS = 8192
"""The number of rows in the table of trigrams; trigram n uses row n modulo this."""


class NgramEmbedding(nn.Module):
    """The sum of the embeddings of the n-grams that contain a character.

    They are the bigram that ends at the character, the bigram that begins there, and the trigram
    around it. A mark stands before the start of a name and past its end.

    Args:
        embedding_size: features of each embedding.
    """

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.before = nn.Embedding(_SYMBOLS**2, embedding_size)
        self.after = nn.Embedding(_SYMBOLS**2, embedding_size)
        self.around = nn.Embedding(_TRIGRAM_ROWS, embedding_size)
        for table in (self.before, self.after, self.around):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor, lengths: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Returns the sums (batch, longest, embedding_size).

        Args:
            ids: int64 (batch, longest), padded character ids.
            lengths: int64 (batch).
            unknown: bool (batch, longest), true for characters to hide.
        """
        if unknown is not None:
            ids = torch.where(unknown, _UNKNOWN, ids)
        steps = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(steps < lengths.unsqueeze(1), ids, _MARK)
        previous = F.pad(ids[:, :-1], (1, 0), value=_MARK)
        following = F.pad(ids[:, 1:], (0, 1), value=_MARK)
        before = previous * _SYMBOLS + ids
        after = ids * _SYMBOLS + following
        around = (before * _SYMBOLS + following) % _TRIGRAM_ROWS
        embedded: Tensor = self.before(before) + self.after(after) + self.around(around)
        return embedded
