"""`Call`: everything a path needs to compute a call, as one value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(slots=True)
class Call:
    """The arguments of one call, on their way from `rnn()` to the path that computes it.

    `rnn()` and `last_state()` make a call of what their caller passed; `layouts.normalise` and
    `tokens.look_up` change its fields to what the operators take, which `namernn_fast.ops`
    describes. From `dispatch.run` on nobody changes a call.
    """

    data: Tensor
    """`input` of the operators. Before `layouts.normalise`, whatever the caller passed."""
    hx: Tensor | None
    weights: Sequence[Tensor]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    dropout: float = 0.0
    """The probability of zeroing an element of a layer's output, except the last layer's. No
    operator takes it: `dispatch.run` splits the stack into layers."""
    trees: int = 0

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped`, all tensors at the top level.

        An `autograd.Function` does not look for tensors inside tuples.
        """
        own = self.data, self.hx, self.sequence_layout, self.reset, self.options, self.trees
        return *own, *self.weights


Path: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]
"""Computes a call without dropout; returns output and h_n. With LAST_STATE in the options only h_n
has a meaning: a path may return any tensor as output."""
