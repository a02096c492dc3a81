"""Embeddings of the n-grams around a character, for the input of the recurrent layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TRIGRAM_ROWS = 8192
"""The number of rows in the table of trigrams; trigram n uses row n modulo this number."""


class NgramEmbedding(nn.Module):
    """Sums the embeddings of the n-grams that contain a character.

    The n-grams are the bigram that ends at the character, the bigram that begins at the character,
    and the trigram around it. A mark before the start of a name and a mark past its end count as
    characters.

    Args:
        embedding_size: the number of features of each embedding.
        alphabet_size: the number of different character ids.
    """

    def __init__(self, embedding_size: int, alphabet_size: int) -> None:
        super().__init__()
        self.mark = alphabet_size  # before the start of a name and past its end
        self.unknown = alphabet_size + 1
        self.symbols = alphabet_size + 2
        self.before = nn.Embedding(self.symbols**2, embedding_size)
        self.after = nn.Embedding(self.symbols**2, embedding_size)
        self.around = nn.Embedding(_TRIGRAM_ROWS, embedding_size)
        for table in (self.before, self.after, self.around):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids: Tensor, lengths: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Returns the summed embeddings (batch, longest, embedding_size).

        Args:
            ids: int64 (batch, longest), padded character ids.
            lengths: int64 (batch), the number of characters of each name.
            unknown: bool (batch, longest), true for characters to hide; None to hide none.
        """
        if unknown is not None:
            ids = torch.where(unknown, self.unknown, ids)
        steps = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(steps < lengths.unsqueeze(1), ids, self.mark)
        previous = F.pad(ids[:, :-1], (1, 0), value=self.mark)
        following = F.pad(ids[:, 1:], (0, 1), value=self.mark)
        before = previous * self.symbols + ids
        after = ids * self.symbols + following
        around = (before * self.symbols + following) % _TRIGRAM_ROWS
        embedded: Tensor = self.before(before) + self.after(after) + self.around(around)
        return embedded
