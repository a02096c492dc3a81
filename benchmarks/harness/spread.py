"""Speed-ups from alternating rounds, and their confidence intervals.

`theirs` and `ours` are the seconds of each round, in timing order. There is at least one round.
"""

import random
import statistics
from collections.abc import Sequence

SAMPLES = 1000


def paired_speed_up(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Returns the median ratio of neighbouring rounds, which cancels machine drift."""
    pairs = zip(theirs, ours, strict=True)
    return statistics.median(their / our for their, our in pairs)


def speed_up_interval(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """Returns the bootstrap 95 % interval of the ratio of two medians.

    Neighbouring rounds are resampled in pairs, so that machine drift cancels out.
    """
    draw = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))
    ratios = []
    for _ in range(SAMPLES):
        their_sample, our_sample = zip(*draw.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(their_sample) / statistics.median(our_sample))
    low, *_, high = statistics.quantiles(ratios, n=40)
    return low, high
