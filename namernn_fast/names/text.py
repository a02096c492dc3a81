"""Names as text and as tensors: folding to ASCII, character ids, and packed batches.

A name is folded as the names data set is customarily read: decomposed (NFD), its combining marks
dropped, only ASCII letters and a few signs kept, in lower case. What is left is a string over
`ALPHABET`, and a character's id is its place in that string.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_SIGNS = " .,;'"
_KEPT = frozenset(string.ascii_letters + _SIGNS)

ALPHABET = string.ascii_lowercase + _SIGNS
"""The characters a folded name can hold; a character's id is its index here."""

_IDS = bytes.maketrans(ALPHABET.encode("ascii"), bytes(range(len(ALPHABET))))


class InputError(ValueError):
    """What the caller named, a path, a file or a name, cannot be used; the message says why."""


def fold(name: str) -> str:
    """Return `name` as a string over `ALPHABET`; it may be empty.

    `"Ślusàrski"` becomes `"slusarski"`. Characters with no ASCII decomposition (`"ß"`, `"ł"`,
    digits, hyphens) are dropped. Blanks at either end go too: in the data they are typing slips
    that eight Korean rows share, and a model would read the language off them.
    """
    # Combining marks are not ASCII, so keeping ASCII drops them.
    kept = (character for character in unicodedata.normalize("NFD", name) if character in _KEPT)
    return "".join(kept).lower().strip()


@dataclass(frozen=True)
class EncodedNames:
    """Names as one run of character ids, ready to be cut into packed batches.

    characters: int64, (sum of the names' lengths), ids in the names' order.
    starts: int64, (number of names), where each name begins in `characters`.
    lengths: int64, (number of names), each at least 1.
    """

    characters: Tensor
    starts: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self, indices: Tensor) -> Tensor:
        """Return `indices`, int64, (batch), reordered from the longest name to the shortest."""
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]

    def pack(self, indices: Tensor, device: str | torch.device = "cpu") -> PackedSequence:
        """Return the names at `indices`, int64, (batch), as a packed batch of ids on `device`.

        The result equals `torch.nn.utils.rnn.pack_sequence(names, enforce_sorted=False)`, save
        that `sorted_indices` is None where `indices` already go from the longest name to the
        shortest (see `by_length`), so that no state need be reordered.
        Raises ValueError when `indices` is empty and IndexError when one is out of range.
        """
        if len(indices) == 0:
            raise ValueError("a batch holds at least one name")
        lengths, order = self.lengths[indices].sort(descending=True, stable=True)
        starts = self.starts[indices][order]
        steps = torch.arange(int(lengths[0])).unsqueeze(1)
        present = steps < lengths  # (longest name, batch)
        data = self.characters[(steps + starts)[present]]
        batch_sizes = present.sum(1)
        in_order = torch.equal(order, torch.arange(len(order)))
        packed = PackedSequence(data, batch_sizes, None if in_order else order)
        return packed.to(device)  # type: ignore[arg-type]  # typed as if for a dtype alone


def encode_names(names: Sequence[str]) -> EncodedNames:
    """Fold `names` and return their character ids.

    Raises InputError when there is no name, or when one holds no character that can be used.
    """
    folded = [fold(name) for name in names]
    if not folded:
        raise InputError("no names were given")
    for name, text in zip(names, folded, strict=True):
        if not text:
            raise InputError(
                f"{name!r} holds no usable character: letters from A to Z, plain or accented, "
                f"and {_SIGNS.strip()} are"
            )
    ids = bytearray("".join(folded).encode("ascii").translate(_IDS))
    lengths = torch.tensor([len(text) for text in folded])
    return EncodedNames(
        characters=torch.frombuffer(ids, dtype=torch.uint8).long(),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
    )


def encode(name: str) -> Tensor:
    """Return the character ids of one name, folded: int64, (length of the folded name).

    Raises InputError when the name holds no character that can be used.
    """
    return encode_names([name]).characters
