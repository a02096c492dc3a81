"""`Call`: everything a path needs to compute one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from .cells import NUMBERED, Cell


@dataclass(slots=True)
class Call:
    """The arguments of one call, passed from `rnn()`, `gru()` or `lstm()` down to its path.

    These, `last_state()` and the modules create it from the arguments of their caller.
    `layouts.normalise` and `tokens.look_up` convert its fields to what the operators take, see
    `namernn_fast.ops`. From `dispatch.run` on it is not modified.
    """

    cell: Cell
    data: Tensor
    """`input` of the operators. Before `layouts.normalise`, whatever the caller passed."""
    hx: Any
    """What the caller passed. `layouts.normalise` makes it `states`."""
    weights: Sequence[Tensor]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    dropout: float = 0.0
    """The probability of zeroing an element of a layer's output, except the last layer's. No
    operator takes it: `dispatch.run` splits the stack into layers."""
    trees: int = 0
    states: Sequence[Tensor] = ()
    """The initial states: none for zeros, otherwise one for each of `cell.states`."""

    def requires_grad(self) -> bool:
        """Returns whether any floating-point tensor of the call requires a gradient."""
        tensors = self.data, *self.states, *self.weights
        return any(tensor.requires_grad for tensor in tensors)

    def convert_states(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Converts the initial states, if they are given."""
        self.states = [convert(state) for state in self.states]

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples. So input, states and weights
        are one sequence at the end, and the number before it says where the weights begin.
        """
        numbers = self.cell.number, self.options, self.trees
        rows = self.sequence_layout, self.reset
        count = 1 + len(self.states)
        return *numbers, *rows, count, self.data, *self.states, *self.weights

    @classmethod
    def of_flat(cls, arguments: Sequence[Any]) -> "Call":
        """Returns the call whose `flat` these arguments are."""
        number, options, trees, layout, reset, count, *tensors = arguments
        data, *states = tensors[:count]
        rows = layout, reset, options, 0.0, trees
        return cls(NUMBERED[number], data, None, tensors[count:], *rows, states=states)


Results: TypeAlias = tuple[Tensor, ...]
"""What a call computes: output and the last states, one for each of `cell.states`."""
Path: TypeAlias = Callable[[Call], Results]
"""A function that computes a call without dropout. With LAST_STATE it may return any tensor as
output."""
