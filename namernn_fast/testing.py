"""The error budget: how far a result may deviate from the result of a more precise oracle.

A fused kernel sums in a different order than `torch.nn.RNN`, so their bits differ, and a fixed
tolerance is too loose for short sequences and too tight for long ones. Instead, the budget requires
that the fused result is about as accurate as the result of `torch.nn.RNN`. The error of a result is
its largest absolute distance from an oracle that computes in higher precision:

    err(ours) <= 2 * max(err(nn.RNN), c * eps * max|ref|) + eps * max|ref|

`eps` is the unit in the last place of 1 in the dtype of the results, and `ref` the oracle's result.
If torch's settings allow products of float32 numbers in lower precision, `eps` is the unit in the
last place of the numbers that are multiplied: 2^-7 for `medium`, 2^-15 for `high`.
The error of `nn.RNN` depends on luck and on the summation order of this machine's BLAS, so it
counts as at least `c` units in the last place of the largest value: 16 in float32 and float64, and
1.5 in 16 bits and in lower precision. So a correct result stays within its budget even if `nn.RNN`
is exact, unless the terms of its sums nearly cancel in all elements. If they do, compare several
draws of the result under one name.

`assert_within_budget` makes a single comparison; an `ErrorBudget` collects the errors of many.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BudgetError", "ErrorBudget", "assert_within_budget", "max_error"]

# `c` by the size of the dtype in bytes. Correct results are off by up to 8 units in the last place
# of the largest value in float32 (over 700 steps), and by up to 1.3 in 16 bits. A single fault
# causes errors of at least 50 units in float32 (a tanh that is off by 1e-5, a product rounded to 16
# bits) and of 10 units in 16 bits (a lost term).
_UNITS = {8: 16.0, 4: 16.0, 2: 1.5}
Precision: TypeAlias = Literal["highest", "high", "medium"]
"""The precision of float32 products, as `torch.set_float32_matmul_precision` names it."""
# `eps` of a float32 number rounded to bfloat16, and to the sum of two bfloat16 numbers.
_LOWER_EPS = {"medium": 2.0**-7, "high": 2.0**-15}


class BudgetError(AssertionError):
    """A result is further from the oracle than its error budget allows."""


@dataclass
class _Extremes:
    """The largest absolute errors and the largest value in all draws of one named result."""

    ours: float = 0.0
    theirs: float = 0.0
    reference: float = 0.0
    nearby: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """The largest distance that each sample of perturbed inputs caused; see `add_nearby`."""


class ErrorBudget:
    """Collects the errors of named results and checks the error budget of each name.

    The budget of a name is `err(ours) <= 2 * max(err(nn.RNN), c * eps * max|ref|) + eps * max|ref|`
    with c = 16, or 1.5 for 16-bit types. All draws of one name count as one tensor.

    Args:
        dtype: The floating-point type of the results, which determines `eps`. For results below the
            smallest normal number of `dtype`, the unit in the last place of that number applies.
        floor: An absolute error that is always allowed.
        units: The value of `c`; default: 16, or 1.5 for 16-bit types and in lower precision.
        precision: The precision of float32 products, which other dtypes ignore.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        floor: float = 0.0,
        units: float | None = None,
        precision: Precision = "highest",
    ):
        lower = dtype == torch.float32 and precision != "highest"
        default_units = _UNITS[2 if lower else dtype.itemsize]
        self.units = default_units if units is None else units
        self.eps: float = _LOWER_EPS[precision] if lower else torch.finfo(dtype).eps
        self.tiny: float = torch.finfo(dtype).tiny
        self.floor = floor
        self.results: dict[Hashable, _Extremes] = defaultdict(_Extremes)

    def add(
        self, name: Hashable, ours: Tensor, theirs: Tensor, reference: Tensor | np.ndarray
    ) -> None:
        """Adds one draw of the result `name`.

        Args:
            name: The result that the draw belongs to.
            ours, theirs: The result under test and the result of `nn.RNN`.
            reference: The oracle's result, in higher precision than `dtype`: a tensor, or a NumPy
                array if float64 is not precise enough.

        Raises:
            BudgetError: if the shapes differ, or if there is a NaN in a result.
        """
        seen = self.results[name]
        seen.ours = max(seen.ours, max_error(ours, reference))
        seen.theirs = max(seen.theirs, max_error(theirs, reference))
        seen.reference = max(seen.reference, _largest(reference))

    def add_nearby(
        self,
        name: Hashable,
        sample: int,
        nearby: Tensor | np.ndarray,
        reference: Tensor | np.ndarray,
    ) -> None:
        """Adds one draw of the oracle's result for randomly perturbed inputs.

        Use this for cases that amplify rounding, such as the derivatives of saturated units. The
        error of `nn.RNN` then counts as at least the root mean square, over samples, of each
        sample's largest distance from the oracle. A single sample's distance depends on luck.
        """
        distances = self.results[name].nearby
        distances[sample] = max(distances[sample], _largest(nearby - reference))

    def exceeded(self) -> list[str]:
        """Returns a sentence for each name whose error exceeds its budget."""
        return [
            f"{name}: error {seen.ours:.3g} exceeds its budget {self.allowed(name):.3g}"
            for name, seen in self.results.items()
            if not seen.ours <= self.allowed(name)
        ]

    def check(self) -> None:
        """Raises `BudgetError` if an error exceeds its budget, or if no results were added."""
        if not self.results:
            raise BudgetError("no results were compared")
        if exceeded := self.exceeded():
            raise BudgetError("; ".join(exceeded))

    def allowed(self, name: Hashable) -> float:
        """Returns the largest error that the budget of `name` allows."""
        seen = self.results[name]
        squares = [distance * distance for distance in seen.nearby.values()]
        nudged = math.sqrt(statistics.fmean(squares or [0.0]))
        last_place = self.eps * max(seen.reference, self.tiny)
        return 2 * max(seen.theirs, nudged, self.units * last_place) + last_place + self.floor


def assert_within_budget(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    precision: Precision = "highest",
) -> None:
    """Checks the error budget of named results, with one draw for each name.

    Args:
        ours, theirs: The results under test and the results of `nn.RNN`, in one dtype.
        reference: The oracle's results, in higher precision than that dtype.
        precision: The precision of float32 products, which other dtypes ignore.

    Raises:
        BudgetError: if an error exceeds its budget, or if names or shapes differ.

    Example:
        >>> x = torch.linspace(-3, 3, 7)
        >>> exact = {"tanh": x.double().tanh()}
        >>> assert_within_budget({"tanh": x.tanh()}, {"tanh": x.tanh()}, exact)
        >>> assert_within_budget({"tanh": x.tanh() + 0.25}, {"tanh": x.tanh()}, exact)
        Traceback (most recent call last):
        namernn_fast.testing.BudgetError: tanh: error 0.25 exceeds its budget ...
    """
    if not ours.keys() == theirs.keys() == reference.keys():
        raise BudgetError(f"expected results {[*reference]}, got {[*ours]} and {[*theirs]}")
    budget = ErrorBudget(next(iter(theirs.values())).dtype, precision=precision)
    for name, exact in reference.items():
        budget.add(name, ours[name], theirs[name], exact)
    budget.check()


def max_error(actual: Tensor, reference: Tensor | np.ndarray) -> float:
    """Returns the largest absolute distance of `actual` from `reference`.

    Raises:
        BudgetError: if the shapes differ, or if there is a NaN in `actual` or `reference`.
    """
    if actual.shape != reference.shape:
        raise BudgetError(f"expected shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    # float32 represents every value of the 16-bit types, and NumPy has no bfloat16.
    actual = actual.detach().to("cpu", torch.promote_types(actual.dtype, torch.float32))
    if isinstance(reference, Tensor):
        error = _largest(actual.to(reference.dtype) - reference.detach().cpu())
    else:
        error = _largest(actual.numpy().astype(reference.dtype) - reference)
    if math.isnan(error):
        raise BudgetError("NaN in a result or in its reference")
    return error


def _largest(values: Tensor | np.ndarray) -> float:
    """Returns the largest absolute value, NaN if any value is NaN, and 0 for no values."""
    if isinstance(values, Tensor):
        return float(values.detach().abs().max()) if values.numel() else 0.0
    return float(abs(values).max(initial=0))
