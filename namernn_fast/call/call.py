"""`Call`: everything a path needs to compute one call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from .. import ops
from ..cells import NUMBERED, Cell

if TYPE_CHECKING:
    from .prepared_weights import PreparedWeights


@dataclass(slots=True)
class Call:
    """The arguments of one call, passed from `rnn()`, `gru()` or `lstm()` down to its path.

    These functions, `last_state()` and the modules create a `Call` from their caller's arguments.
    `layouts.normalise` and `tokens.look_up` convert its fields to what the operators take (see
    `namernn_fast.ops`). Paths do not modify it.
    """

    cell: Cell
    data: Tensor
    """`input` of the operators. Before `layouts.normalise`, whatever the caller passed."""
    hx: Any
    """The argument hx as the caller passed it. `layouts.normalise` converts hx to `states`."""
    weights: Sequence[Tensor]
    sequence_layout: Tensor | None
    reset: Tensor | None
    options: int
    dropout: float = 0.0
    """The probability of zeroing an element of a layer's output, except the last layer's. The fused
    operators have no dropout, so `dispatch.run` splits the stack into layers."""
    reset_to: Any = None
    """The argument reset_to as the caller passed it. `layouts.normalise` converts it to
    `restart_states`."""
    trees: int = 0
    states: Sequence[Tensor] = ()
    """The initial states: empty for zeros, otherwise one tensor for each of `cell.states`."""
    prepared: "PreparedWeights | None" = None
    """The weights of a prepared layer. `weights` then has only shapes, without values."""
    restart_states: Sequence[Tensor] = ()
    """The states that steps start from where `reset` is True: empty for zeros, otherwise one tensor
    (seq_len, num_layers, batch, features) for each of `cell.states`."""
    inputs: Mapping[str, Any] | None = None
    """Arguments for `cell.inputs`, as the caller passed them, or None without any.
    `layouts.normalise` converts them to `beside`."""
    beside: Sequence[Tensor] = ()
    """What the cell reads beside data: nothing, or one tensor for each of `cell.inputs`, laid out
    like data, with num_layers * directions * hidden_size features."""

    def requires_grad(self) -> bool:
        """Returns whether any floating-point tensor of the call requires a gradient."""
        tensors = self.data, *self.states, *self.restart_states, *self.beside, *self.weights
        return any(tensor.requires_grad for tensor in tensors)

    def convert_states(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Applies `convert` to each initial state and to each state after resets."""
        self.states = [convert(state) for state in self.states]
        self.restart_states = [convert(state) for state in self.restart_states]

    def initial_states(self, batch: int) -> Sequence[Tensor]:
        """Returns `states`, or zeros for this number of sequences if there are none."""
        if self.states:
            return self.states
        weights, directions = self.weights, ops.directions_of(self.options)
        rows = ops.layer_count(self.cell, weights, self.options) * directions, batch
        return [weights[1].new_zeros(*rows, size) for size in ops.state_sizes(self.cell, weights)]

    def states_of_layers(self, layers: int) -> Sequence[Sequence[Tensor]]:
        """Returns the initial states of each layer, (directions, batch, features) each."""
        if not self.states:
            return [()] * layers
        return [*zip(*(state.chunk(layers) for state in self.states), strict=True)]

    def joined(self, weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
        """Returns `tensors` and `options` of the operators for these weights."""
        if not (self.states or self.restart_states or self.beside):
            return weights, self.options
        lists = ops.Lists(self.states, self.restart_states, self.beside, weights)
        return lists.joined(self.options)

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples. So data and `tensors` of the
        operators are separate arguments at the end.
        """
        tensors, options = self.joined(self.weights)
        numbers = self.cell.number, options, self.trees
        return *numbers, self.sequence_layout, self.reset, self.data, *tensors

    @classmethod
    def of_flat(cls, arguments: Sequence[Any]) -> "Call":
        """Returns the call that `flat` flattened to these arguments."""
        number, options, trees, layout, reset, data, *tensors = arguments
        cell = NUMBERED[number]
        states, restart_states, beside, weights = ops.split(cell, tensors, options)
        options &= ~(ops.STATES | ops.RESET_TO | ops.INPUTS)
        call = cls(cell, data, None, weights, layout, reset, options, trees=trees, states=states)
        call.restart_states, call.beside = restart_states, beside
        return call


Results: TypeAlias = tuple[Tensor, ...]
"""What a call computes: output and the last states, one for each of `cell.states`."""
Path: TypeAlias = Callable[[Call], Results]
"""A function that computes a call and, with LAST_STATE, may return any tensor as output."""


class Choice(NamedTuple):
    """The path of a call, and the reasons against the other paths."""

    path: Path
    why_not_kernel: str | None = None
    """Why no fused kernel can take the call; None if one can."""
    why_not_torch: str | None = None
    """Why torch's own operator cannot take the call either; None if it can, or if a kernel does."""
    why_not_ids: str | None = None
    """Why the path takes rows of features instead of token ids; None if it takes both."""
