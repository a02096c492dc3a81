"""Confidence intervals of paired ratios of times, and what is concluded from them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
FEW = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.959964
TOLERANCE = 1.04
"""A cell is slower if its whole interval lies beyond this ratio of new to old time."""


def student_t(degrees: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t distribution.

    Args:
        degrees: the degrees of freedom, at least 1. Above 10 the quantile is the expansion of
            Cornish and Fisher around the normal distribution's.
    """
    if degrees <= len(FEW):
        return FEW[degrees - 1]
    z = NORMAL
    first = (z**3 + z) / (4 * degrees)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + first + second + third


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval of a ratio: old time over new time, above 1 if new is faster."""

    low: float
    ratio: float
    high: float
    count: int
    """The number of pairs."""

    @property
    def slower(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.high < 1

    @property
    def much_slower(self) -> bool:
        """Whether the whole interval lies beyond the tolerance."""
        return self.high < 1 / TOLERANCE

    @property
    def settled(self) -> bool:
        """Whether the interval lies wholly on one side of the tolerance."""
        return self.much_slower or self.low > 1 / TOLERANCE

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f}, {self.count} pairs)"


def interval(logarithms: Sequence[float]) -> Interval:
    """Returns the interval of the geometric mean of paired ratios.

    The mean of the logarithms with one pair in eight trimmed at each end, because a busy neighbour
    can multiply a single time, and the interval of Tukey and McLaughlin (1963) for such a mean: the
    winsorized standard deviation and Student's t. Of fewer than 8 pairs none is trimmed.

    Args:
        logarithms: the natural logarithm of old time over new time of each pair, at least one.
    """
    values = sorted(logarithms)
    count, cut = len(values), len(values) // 8
    kept = values[cut : count - cut]
    mean = statistics.fmean(kept)
    half = math.inf
    if len(kept) > 1:
        winsorized = [kept[0]] * cut + kept + [kept[-1]] * cut
        error = statistics.stdev(winsorized) * math.sqrt(count) / len(kept)
        half = student_t(len(kept) - 1) * error
    high = math.exp(mean + half) if half < math.inf else math.inf
    return Interval(math.exp(mean - half), math.exp(mean), high, count)
