"""Names as text and as tensors: folding to ASCII, character ids, and packed batches.

A name is folded as the names data set is customarily read: decomposed (NFD), its combining marks
dropped, only ASCII letters and a few signs kept, in lower case. A folded name is a string over
`ALPHABET`, and the id of a character is its index there.
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
"""The characters of folded names; the id of a character is its index here."""

_IDS = bytes.maketrans(ALPHABET.encode("ascii"), bytes(range(len(ALPHABET))))


class InputError(ValueError):
    """A path, file or name that the caller gave cannot be used; the message says why."""


def fold(name: str) -> str:
    """Returns `name` as a string over `ALPHABET`, which may be empty.

    `"Ślusàrski"` becomes `"slusarski"`. Characters with no ASCII decomposition (`"ß"`, `"ł"`,
    digits, hyphens) are dropped. So are blanks at either end: in the data eight Korean rows have
    them by a typing slip, and a model would tell the language by them.
    """
    # Combining marks are not ASCII, so keeping ASCII drops them.
    kept = (character for character in unicodedata.normalize("NFD", name) if character in _KEPT)
    return "".join(kept).lower().strip()


@dataclass(frozen=True)
class EncodedNames:
    """Names as one run of character ids, ready to be cut into packed batches."""

    characters: Tensor
    """int64 (sum of the names' lengths), the ids of the names one after another"""
    starts: Tensor
    """int64 (number of names), where each name begins in `characters`"""
    lengths: Tensor
    """int64 (number of names), each at least 1"""

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self, indices: Tensor) -> Tensor:
        """Returns `indices`, int64 (batch), sorted from the longest name to the shortest."""
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]

    def pack(self, indices: Tensor, device: str | torch.device = "cpu") -> PackedSequence:
        """Returns names as a packed batch of character ids.

        The result equals `torch.nn.utils.rnn.pack_sequence(names, enforce_sorted=False)`, except
        that `sorted_indices` is None where the names are already sorted from the longest to the
        shortest (see `by_length`), so that no state need be reordered.

        Args:
            indices: int64 (batch), of the names.
            device: of the result.

        Raises:
            ValueError: `indices` is empty.
            IndexError: an index is out of range.
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
    """Folds `names` and returns their character ids.

    Raises:
        InputError: there is no name, or a name holds no usable character.
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
    """Returns the character ids of one name: int64 (length of the folded name).

    Raises:
        InputError: the name holds no usable character.
    """
    return encode_names([name]).characters
