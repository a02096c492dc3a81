"""A call as one value, and its conversion to what the operators take.

`Call` is that value. `layouts` converts inputs of every layout, `tokens` converts token ids, and
`dtypes` converts dtypes, as autocast does. `options` computes the option bits, and `checks` raises
the errors of torch's own layers. `time_major` converts rows further, for paths without a kernel.
"""

from .call import Call, Choice, Path, Results

__all__ = ["Call", "Choice", "Path", "Results"]
