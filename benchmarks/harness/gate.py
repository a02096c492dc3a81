"""The gate: nothing is timed before its results are known to be right.

The fused layer has to keep the error budget of `namernn_fast.testing`, which compares it with
`nn.RNN`. An implementation by others rounds in ways of its own, so `check_rival` asks only whether
its formula is right.
"""

from collections.abc import Mapping

from torch import Tensor

from namernn_fast.testing import BudgetError, max_error


def check_rival(
    name: str, results: Mapping[str, Tensor], oracle: Mapping[str, Tensor], limit: float
) -> None:
    """Raises `BudgetError` if a result is off by `limit` of the oracle's largest value or more."""
    for what, exact in oracle.items():
        error = max_error(results[what], exact) / float(exact.abs().max())
        if not error < limit:
            raise BudgetError(f"{name} is off by {error:.2g} in {what}")
