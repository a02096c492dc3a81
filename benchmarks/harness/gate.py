"""The gate: nothing is timed before its results are known to be correct.

The fused layer must meet the error budget of `namernn_fast.testing`, which compares it with
`nn.RNN`. Other implementations round differently, so `rival_error` only checks that they compute
the right formula. A wrong layer fails the run. A wrong rival is reported and not timed, but does
not fail the run, because a rival may be wrong only on some processors.
"""

from collections.abc import Mapping

from torch import Tensor

from namernn_fast.testing import BudgetError, max_error


def rival_error(
    name: str, results: Mapping[str, Tensor], oracle: Mapping[str, Tensor], limit: float
) -> BudgetError | None:
    """Returns an error if the results of a rival are wrong, otherwise None.

    Results are wrong if an error reaches `limit`, relative to the oracle's largest value.
    """
    try:
        for what, exact in oracle.items():
            error = max_error(results[what], exact) / float(exact.abs().max())
            if not error < limit:
                return BudgetError(f"{name} is off by {error:.2g} in {what}")
    except BudgetError as error:  # another shape, or a NaN
        return BudgetError(f"{name}: {error}")
    return None
