"""How far a speed-up can be trusted."""

import random
import statistics
from collections.abc import Sequence

SAMPLES = 1000


def speed_up_interval(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the ratio of two medians, by the bootstrap.

    Rounds that took turns are drawn together, so that a drift of the machine cancels out.

    Args:
        theirs, ours: seconds of each round, at least one, in the order in which they were timed.
    """
    draw = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))
    ratios = []
    for _ in range(SAMPLES):
        one, other = zip(*draw.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(one) / statistics.median(other))
    low, *_, high = statistics.quantiles(ratios, n=40)
    return low, high
