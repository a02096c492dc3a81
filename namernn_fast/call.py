"""`Call`: everything a path needs to compute one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

Cell: TypeAlias = Literal["rnn", "gru", "lstm"]
"""The kind of a layer's cell: that of `nn.RNN`, of `nn.GRU` or of `nn.LSTM`."""
CLASSES: dict[Cell, str] = {"rnn": "FusedRNN", "gru": "FusedGRU", "lstm": "FusedLSTM"}
"""The module of each cell, for error messages."""


@dataclass(slots=True)
class Call:
    """The arguments of one call, passed from `rnn()`, `gru()` or `lstm()` down to its path.

    These and `last_state()` create it from the arguments of their caller. `layouts.normalise` and
    `tokens.look_up` convert its fields to what the operators take, see `namernn_fast.ops`. From
    `dispatch.run` on it is not modified.
    """

    data: Tensor
    """`input` of the operators. Before `layouts.normalise`, whatever the caller passed."""
    hx: Tensor | None
    """Before `layouts.normalise`, the pair of hx and cx for an LSTM."""
    weights: Sequence[Tensor]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    dropout: float = 0.0
    """The probability of zeroing an element of a layer's output, except the last layer's. No
    operator takes it: `dispatch.run` splits the stack into layers."""
    trees: int = 0
    cell: Cell = "rnn"
    cx: Tensor | None = None
    """The initial cell states of an LSTM; None if hx is."""

    def requires_grad(self) -> bool:
        """Returns whether any floating-point tensor of the call requires a gradient."""
        hx, cx = self.hx, self.cx
        return (
            self.data.requires_grad
            or (hx is not None and hx.requires_grad)
            or (cx is not None and cx.requires_grad)
            or any(weight.requires_grad for weight in self.weights)
        )

    def convert_states(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Converts hx and cx, if they are given."""
        self.hx = None if self.hx is None else convert(self.hx)
        self.cx = None if self.cx is None else convert(self.cx)

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples.
        """
        tensors = self.data, self.hx, self.cx, self.sequence_layout, self.reset
        return *tensors, self.options, self.trees, self.cell, *self.weights


Results: TypeAlias = tuple[Tensor, ...]
"""What a call computes: output, h_n and, for an LSTM, c_n."""
Path: TypeAlias = Callable[[Call], Results]
"""A function that computes a call without dropout. With LAST_STATE it may return any tensor as
output."""
