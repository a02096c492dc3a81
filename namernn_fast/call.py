"""`Call`: everything a path needs to compute one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor


@dataclass(slots=True)
class Call:
    """The arguments of one call, passed from `rnn()` down to the path that computes it.

    `rnn()` and `last_state()` create it from the arguments of their caller. `layouts.normalise` and
    `tokens.look_up` convert its fields to what the operators take, see `namernn_fast.ops`. From
    `dispatch.run` on it is not modified.
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
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples.
        """
        own = self.data, self.hx, self.sequence_layout, self.reset, self.options, self.trees
        return *own, *self.weights


Path: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]
"""A function that computes a call without dropout and returns output and h_n. With LAST_STATE only
h_n is meaningful: a path may return any tensor as output."""
