"""`Arguments`, what a caller passes, and `Call`, what the operators take.

`normalise` makes a `Call` of `Arguments`: `layouts` converts inputs of every layout, and `dtypes`
converts dtypes, as autocast does. `tokens` converts token ids. `options` computes the option bits,
and `checks` raises the errors of torch's own layers. `time_major` converts rows to time-major
order, for paths without a kernel.
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
