"""Finds the names for packed batches and the training epoch."""

import functools
import os

from benchmarks.harness.paths import ROOT
from namernn_fast.names import NamesData, load_names

VARIABLE = "NAMERNN_FAST_DATA"
SHARED = ROOT.parent / "shared" / "data" / "names"


@functools.cache
def names() -> NamesData:
    """Returns the data set in `NAMERNN_FAST_DATA`, else the one next to the repository, else what
    `load_names` finds."""
    beside = not os.environ.get(VARIABLE) and SHARED.is_dir()
    return load_names(SHARED if beside else None)


def description() -> str:
    """Describes the data set that `names` returns, without a path."""
    kind = "the small embedded sample of names" if names().is_sample else "the names data set"
    return f"{kind}, {len(names().rows):,} rows"
