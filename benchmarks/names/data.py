"""Finds the names data set, for packed batches and for training the classifier."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.paths import ROOT
from namernn_fast.names import NamesData, load_names

VARIABLE = "NAMERNN_FAST_DATA"
SHARED = ROOT.parent / "shared" / "data" / "names"


@functools.cache
def names() -> NamesData:
    """Returns the data set in `NAMERNN_FAST_DATA` or next to the repository, or else the data set
    that `load_names` finds."""
    beside = not os.environ.get(VARIABLE) and SHARED.is_dir()
    return load_names(SHARED if beside else None)


def description() -> str:
    """Describes the data set that `names` returns, without a path."""
    kind = "the small embedded sample of names" if names().is_sample else "the names data set"
    return f"{kind}, {len(names().rows):,} rows"


@dataclass(frozen=True)
class Corpus:
    """Surnames as written, with their languages."""

    names: Sequence[str]
    labels: Tensor
    """int64 `(names,)`: indices into `languages`"""
    languages: tuple[str, ...]

    @classmethod
    def of_data(cls, most: int | None = None) -> "Corpus":
        """Returns the data set in random order, limited to its first `most` names."""
        order = torch.randperm(len(names().rows), generator=torch.Generator().manual_seed(0))
        rows = [names().rows[index] for index in order[:most].tolist()]
        labels = torch.tensor([label for _, label in rows])
        return cls([name for name, _ in rows], labels, names().languages)
