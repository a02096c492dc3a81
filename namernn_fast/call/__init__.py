"""`Call`, which holds the arguments of one call, and their conversion to what the operators take.

`layouts` converts inputs of every layout, `tokens` converts token ids, and `dtypes` converts
dtypes, as autocast does. `options` computes the option bits, and `checks` raises the errors of
torch's own layers. `time_major` converts rows to time-major order, for paths without a kernel.
"""

from .call import Call, Choice, Path, Results

__all__ = ["Call", "Choice", "Path", "Results"]
