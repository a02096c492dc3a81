"""The gate that every cell passes before it is timed: an error budget instead of a tolerance.

A float32 result may be twice as far from the float64 truth as `nn.RNN`'s own, plus one unit in the
last place of the largest value: `err(ours) <= 2 * err(nn.RNN) + eps * max|reference|`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class GateError(AssertionError):
    """A result is further from the oracle than its budget allows, so its cell is not timed."""


def max_error(actual: Tensor, reference: Tensor) -> float:
    """The largest absolute distance of `actual` from a float64 `reference` of the same shape."""
    if actual.shape != reference.shape:
        raise GateError(f"shape {tuple(actual.shape)} where {tuple(reference.shape)} was due")
    return (actual.double() - reference).abs().max().item()


def check(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> None:
    """Compare named results of any shapes with the oracle's; `GateError` names all in the red."""
    if not ours.keys() == theirs.keys() == oracle.keys():
        raise GateError(f"results {[*ours]} and {[*theirs]} where {[*oracle]} were due")
    red = []
    for name, reference in oracle.items():
        eps = torch.finfo(theirs[name].dtype).eps
        budget = 2 * max_error(theirs[name], reference) + eps * reference.abs().max().item()
        error = max_error(ours[name], reference)
        # Written so that a NaN on either side is red.
        if not error <= budget:
            red.append(f"{name}: error {error:.3g} exceeds its budget {budget:.3g}")
    if red:
        raise GateError("; ".join(red))
