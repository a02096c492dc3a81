"""The one rule for errors: ours may be twice that of `nn.RNN`, against a more precise oracle.

err(ours) <= 2 * err(nn.RNN) + eps * max|ref|, for every named result. Draws of the same kind count
as one tensor: by itself a tensor of few elements can find `nn.RNN` exact by luck.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Extremes:
    """Largest absolute errors and the largest value of one named result, over its draws."""

    ours: float = 0.0
    theirs: float = 0.0
    reference: float = 0.0


class Budget:
    """Collects errors of named results, then checks the rule for each name."""

    def __init__(self, dtype: torch.dtype):
        self.eps = torch.finfo(dtype).eps
        self.results: dict[object, Extremes] = defaultdict(Extremes)

    def add(self, name, ours, theirs, reference) -> None:
        """One draw: tensors `ours` and `theirs`, an array `reference`, all of one shape."""
        assert ours.shape == theirs.shape == reference.shape, name
        seen = self.results[name]
        seen.ours = max(seen.ours, error(ours, reference))
        seen.theirs = max(seen.theirs, error(theirs, reference))
        seen.reference = max(seen.reference, float(np.abs(reference).max(initial=0)))

    def check(self) -> None:
        assert self.results
        over = {
            name: seen
            for name, seen in self.results.items()
            if not seen.ours <= 2 * seen.theirs + self.eps * seen.reference
        }
        assert not over, over


def error(value: torch.Tensor, reference: np.ndarray) -> float:
    array = value.detach().to(torch.promote_types(value.dtype, torch.float32)).numpy()
    largest = float(np.abs(array.astype(reference.dtype) - reference).max(initial=0))
    assert not np.isnan(largest), "NaN where the reference has a number"
    return largest
