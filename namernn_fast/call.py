"""`Call`: everything a path needs to compute one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

Cell: TypeAlias = Literal["rnn", "gru"]
"""The kind of a layer's cell: that of `nn.RNN` or that of `nn.GRU`."""
CLASSES: dict[Cell, str] = {"rnn": "FusedRNN", "gru": "FusedGRU"}
"""The module of each cell, for error messages."""


@dataclass(slots=True)
class Call:
    """The arguments of one call, passed from `rnn()` or `gru()` down to the path that computes it.

    These and `last_state()` create it from the arguments of their caller. `layouts.normalise` and
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
    cell: Cell = "rnn"

    def requires_grad(self) -> bool:
        """Returns whether any floating-point tensor of the call requires a gradient."""
        hx = self.hx
        return (
            self.data.requires_grad
            or (hx is not None and hx.requires_grad)
            or any(weight.requires_grad for weight in self.weights)
        )

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples.
        """
        own = self.data, self.hx, self.sequence_layout, self.reset, self.options, self.trees
        return *own, self.cell, *self.weights


Path: TypeAlias = Callable[[Call], tuple[Tensor, Tensor]]
"""A function that computes a call without dropout and returns output and h_n. With LAST_STATE only
h_n is meaningful: a path may return any tensor as output."""
