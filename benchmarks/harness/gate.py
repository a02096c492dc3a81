"""The one rule for errors, for the tests and for whatever is about to be timed.

A result may be twice as far from a more precise oracle as `nn.RNN`'s own, plus one unit in the last
place of the largest value: `err(ours) <= 2 * err(nn.RNN) + eps * max|reference|`.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


class GateError(AssertionError):
    """A result is further from the oracle than its budget allows."""


@dataclass
class Extremes:
    """The largest absolute errors and the largest value of one named result, over its draws."""

    ours: float = 0.0
    theirs: float = 0.0
    reference: float = 0.0
    nearby: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """The largest distance of each sample of slightly other values."""


class Budget:
    """Collects errors of named results, then checks the rule for each name.

    Draws of one name count as one tensor: by itself a tensor of few elements can find `nn.RNN`
    exact by luck.

    Below the smallest normal number the unit in the last place is that of this number. `floor` is
    an error that is allowed in any case.
    """

    def __init__(self, dtype: torch.dtype, floor: float = 0.0):
        self.eps = torch.finfo(dtype).eps
        self.tiny = torch.finfo(dtype).tiny
        self.floor = floor
        self.results: dict[Hashable, Extremes] = defaultdict(Extremes)

    def add(
        self,
        name: Hashable,
        ours: Tensor,
        theirs: Tensor,
        reference: np.ndarray,
    ) -> None:
        """One draw, all of one shape; the reference in a precision above the tensors'."""
        seen = self.results[name]
        seen.ours = max(seen.ours, max_error(ours, reference))
        seen.theirs = max(seen.theirs, max_error(theirs, reference))
        seen.reference = max(seen.reference, float(np.abs(reference).max(initial=0)))

    def add_nearby(
        self, name: Hashable, sample: int, nearby: np.ndarray, reference: np.ndarray
    ) -> None:
        """One draw of the reference for values nudged by chance, one way for each sample.

        The error of `nn.RNN` counts as no smaller than what such a nudge does to the result: the
        root mean square of its distances, for a single one may be small or large by luck.
        """
        distances = self.results[name].nearby
        distance = float(np.abs(nearby - reference).max(initial=0))
        distances[sample] = max(distances[sample], distance)

    def in_the_red(self) -> list[str]:
        """What is to be said of each name whose error exceeds its budget."""
        return [
            f"{name}: error {seen.ours:.3g} exceeds its budget {self._allowed(seen):.3g}"
            for name, seen in self.results.items()
            if not seen.ours <= self._allowed(seen)
        ]

    def check(self) -> None:
        """`GateError` with all names in the red, or where nothing was collected."""
        if not self.results:
            raise GateError("no results were compared")
        if red := self.in_the_red():
            raise GateError("; ".join(red))

    def shares(self) -> dict[Hashable, float]:
        """How much of its budget each name has taken, up to 1 where it is kept."""
        return {name: seen.ours / self._allowed(seen) for name, seen in self.results.items()}

    def _allowed(self, seen: Extremes) -> float:
        nudged = float(np.sqrt(np.mean(np.square([*seen.nearby.values()] or [0.0]))))
        last_place = self.eps * max(seen.reference, self.tiny)
        return 2 * max(seen.theirs, nudged) + last_place + self.floor


def max_error(actual: Tensor, reference: np.ndarray) -> float:
    """The largest absolute distance of `actual` from the reference; NaN in either is an error."""
    if actual.shape != reference.shape:
        raise GateError(f"shape {tuple(actual.shape)} where {reference.shape} was due")
    # NumPy has no bfloat16; float32 holds all of its values.
    array = actual.detach().to(torch.promote_types(actual.dtype, torch.float32)).numpy()
    largest = float(np.abs(array.astype(reference.dtype) - reference).max(initial=0))
    if np.isnan(largest):
        raise GateError("NaN in a result or in its reference")
    return largest


def check(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> None:
    """Compare named results of any shapes with a float64 oracle's, one draw of each."""
    if not ours.keys() == theirs.keys() == oracle.keys():
        raise GateError(f"results {[*ours]} and {[*theirs]} where {[*oracle]} were due")
    budget = Budget(next(iter(theirs.values())).dtype)
    for name, reference in oracle.items():
        budget.add(name, ours[name], theirs[name], reference.detach().numpy())
    budget.check()
