"""Encodes names as tensors of character ids, and packs batches of names.

The id of a character is its index in the alphabet of the folding. Names are encoded once, into a
single tensor of ids. Tensor operations cut batches from this tensor, without a Python loop over
names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .folding import ASCII, Folding
from .text import InputError, check_names

_KEY_CHARACTERS = 6  # how many characters of the ASCII alphabet fit in an int32 sort key

# Maximum number of entries in a (batches, steps, names per batch) table. A table of this size fits
# in the cache.
_TABLE_PLACES = 131_072


@dataclass(frozen=True)
class EncodedNames:
    """Names as one concatenated tensor of character ids, ready to be cut into packed batches."""

    characters: Tensor
    """int64 (sum of the names' lengths), the ids of the names one after another"""
    starts: Tensor
    """int64 (number of names), the index in `characters` at which each name starts"""
    lengths: Tensor
    """int64 (number of names), the number of characters of each name, at least 1"""

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self, indices: Tensor, batch_size: int | None = None) -> Tensor:
        """Returns `indices` sorted from the longest name to the shortest.

        Args:
            indices: int64 (number of names).
            batch_size: if given, each block of this many indices is sorted separately.
        """
        lengths = self.lengths[indices]
        if batch_size is None or len(indices) <= batch_size:
            return indices[lengths.argsort(descending=True, stable=True)]
        batches = torch.arange(len(indices)).div_(batch_size, rounding_mode="floor")
        keys = batches.mul_(int(lengths.max()) + 1).sub_(lengths)
        return indices[keys.argsort(stable=True)]

    def by_beginning(self, indices: Tensor) -> Tensor:
        """Returns `indices` sorted by the ids of each name's first characters (up to 6).

        Names with a common prefix become neighbours.

        Args:
            indices: int64 (number of names).
        """
        places, lengths = self.starts[indices], self.lengths[indices]
        last = len(self.characters) - 1
        base = int(self.characters.max()) + 2  # 0 means past the end of a name
        keys = torch.zeros(len(indices), dtype=torch.int32)
        for step in range(min(_KEY_CHARACTERS, int(31 / math.log2(base)))):
            ids = self.characters.index_select(0, places.clamp(max=last)).int().add_(1)
            keys.mul_(base).add_(ids.mul_(lengths > step))
            places += 1
        return indices[keys.argsort(stable=True)]

    def pack(self, indices: Tensor, device: str | torch.device = "cpu") -> PackedSequence:
        """Returns names as a packed batch of character ids.

        The result equals `torch.nn.utils.rnn.pack_sequence(names, enforce_sorted=False)`, except
        that `sorted_indices` is None if the names are already sorted from the longest to the
        shortest (see `by_length`), so that no states need reordering.

        Args:
            indices: int64 (batch), the names to pack.
            device: where to put the result.

        Raises:
            ValueError: `indices` is empty.
            IndexError: an index is out of range.
        """
        if len(indices) == 0:
            raise ValueError("a batch must contain at least one name")
        if len(indices) == 1:  # fast path
            begin, length = int(self.starts[indices]), int(self.lengths[indices])
            data = self.characters[begin : begin + length].to(device)
            return PackedSequence(data, torch.ones(length, dtype=torch.int64))
        lengths, order = self.lengths[indices].sort(descending=True, stable=True)
        data, batch_sizes = self._select(lengths, self.starts[indices][order], int(lengths[0]))
        in_order = torch.equal(order, torch.arange(len(order)))
        packed = PackedSequence(data, batch_sizes, None if in_order else order)
        return packed.to(device)  # type: ignore[arg-type,unused-ignore]  # the annotation allows only a dtype

    def pack_each(
        self, indices: Tensor, batch_size: int, device: str | torch.device = "cpu"
    ) -> Iterator[PackedSequence]:
        """Yields packed batches of `batch_size` names each; the last batch may have fewer.

        Prepares many batches at once, which reduces the overhead of small batches.

        Args:
            indices: int64 (number of names), sorted within each batch from the longest name to the
                shortest, as `by_length(indices, batch_size)` returns them.
            batch_size: the number of names in a batch.
            device: where to put the results.

        Raises:
            IndexError: an index is out of range.
        """
        if len(indices) == 0:
            return
        batch_size = min(batch_size, len(indices))
        # int32 operations are nearly twice as fast as int64 operations.
        small = torch.int32 if len(self.characters) < 2**31 else torch.int64
        missing = -len(indices) % batch_size  # names of length 0 fill the last batch
        lengths, starts = (
            F.pad(values[indices].to(small), (0, missing)).view(-1, 1, batch_size)
            for values in (self.lengths, self.starts)
        )
        longest = lengths[:, 0, 0]
        at_once = max(_TABLE_PLACES // (int(longest.max()) * batch_size), 1)
        parts = (values.split(at_once) for values in (lengths, starts, longest))
        for some_lengths, some_starts, steps in zip(*parts, strict=True):
            data, batch_sizes = self._select(some_lengths, some_starts, int(steps.max()))
            rows = some_lengths.sum((1, 2)).tolist()
            packed = data.to(device).split(rows)
            sizes = batch_sizes[batch_sizes > 0].split(steps.tolist())
            yield from map(PackedSequence, packed, sizes)

    def _select(self, lengths: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Returns the data and the batch_sizes of one or more packed batches.

        Args:
            lengths, starts: (batch), or (batches, 1, batch) for several batches; each batch is
                sorted from the longest name to the shortest.
            longest: the length of the longest name.

        Returns:
            The concatenated data of all batches, and batch_sizes: (longest), or (batches,
            longest) for several batches, with zeros for steps past the longest name of a batch.
        """
        steps = torch.arange(longest, dtype=lengths.dtype).unsqueeze(1)
        present = steps < lengths  # (…, longest, batch): steps first, like the data
        places = (steps + starts).masked_select(present)
        return self.characters.index_select(0, places), present.sum(-1)


def encode_names(names: Iterable[str], folding: Folding = ASCII) -> EncodedNames:
    """Folds `names` and returns their character ids.

    Args:
        names: the names, all usable (see `folding.why_unusable`).
        folding: the folding of the model that will read the names (`Checkpoint.folding`).

    Raises:
        TypeError: as in `check_names`.
        InputError: there is no name, or a name is unusable.
    """
    names = check_names(names)
    if not names:
        raise InputError("no names were given")
    return _encode(folding.fold_all(names), folding)


def encode_folded(texts: Sequence[str], folding: Folding = ASCII) -> EncodedNames:
    """Returns the character ids of non-empty names that `folding` has already folded."""
    return _encode(folding.joined(texts), folding)


def encode(name: str, folding: Folding = ASCII) -> Tensor:
    """Returns the character ids of one name: int64 (length of the folded name).

    Raises:
        InputError: the name is unusable.

    Example:
        >>> encode("Ana").tolist()
        [0, 13, 0]
    """
    return encode_names([name], folding).characters


def _encode(lines: bytes, folding: Folding) -> EncodedNames:
    """Returns the character ids of folded names in the format of `Folding.fold_lines`."""
    text = torch.frombuffer(bytearray(b"\n%b\n" % lines), dtype=torch.uint8)
    newlines = (text == ord("\n")).nonzero().squeeze(1)
    lengths = newlines.diff() - 1
    ids = bytearray(folding.ids(lines))
    return EncodedNames(
        characters=torch.frombuffer(ids, dtype=torch.uint8).long(),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
    )
