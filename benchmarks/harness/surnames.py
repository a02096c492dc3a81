"""The names that packed batches and the training epoch are drawn from, and where they are found."""

import functools
import os

from benchmarks.harness.paths import ROOT
from namernn_fast.names import NamesData, load_names

VARIABLE = "NAMERNN_FAST_DATA"
SHARED = ROOT.parent / "shared" / "data" / "names"


@functools.cache
def names() -> NamesData:
    """The data set that the variable names, else the one beside the repository, else any found."""
    beside = not os.environ.get(VARIABLE) and SHARED.is_dir()
    return load_names(SHARED if beside else None)


def description() -> str:
    """What `names` found, in words that name no path."""
    kind = "the small embedded sample of names" if names().is_sample else "the names data set"
    return f"{kind}, {len(names().rows):,} rows"
