"""Converts `Arguments`, as a caller passes them, to a `Call`, as the operators take it.

`normalise` does the conversion: `layouts` converts input of any layout, and `dtypes` casts like
autocast. `tokens` converts token ids. `options` computes the option bits, and `checks` raises the
errors of torch's own layers. For paths without a kernel, `time_major` makes rows time-major.
"""

from .call import Arguments, Call, Choice, Input, Lengths, Path, Results, given
from .normalising import normalise

__all__ = [
    "Arguments",
    "Call",
    "Choice",
    "Input",
    "Lengths",
    "Path",
    "Results",
    "given",
    "normalise",
]
