"""The gate: nothing is timed before its results are known to be correct.

The fused layer must meet the error budget of `namernn_fast.testing`, which compares it with
`nn.RNN`. Other implementations round differently, so `check_rival` only checks that they compute
the right formula.
"""

from collections.abc import Mapping

from torch import Tensor

from namernn_fast.testing import BudgetError, max_error


def check_rival(
    name: str, results: Mapping[str, Tensor], oracle: Mapping[str, Tensor], limit: float
) -> None:
    """Raises `BudgetError` if an error reaches `limit`, relative to the oracle's largest value."""
    for what, exact in oracle.items():
        error = max_error(results[what], exact) / float(exact.abs().max())
        if not error < limit:
            raise BudgetError(f"{name} is off by {error:.2g} in {what}")
