"""`Arguments`: the arguments as a caller passes them. `Call`: the arguments of the operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from ..cells import Cell
from ..equations import find_cell

if TYPE_CHECKING:
    from .prepared_weights import PreparedWeights


Input = TypeVar("Input", bound=Tensor | PackedSequence)
"""The type of a layer's input, which is also the type of its output."""


class SupportsArray(Protocol):
    """A NumPy array, or another object that `torch.tensor` reads through `__array__`."""

    def __array__(self) -> Any:
        """Returns the values as a NumPy array."""


Lengths: TypeAlias = Tensor | Sequence[int] | SupportsArray
"""The number of steps of each padded sequence: (batch), of any integer dtype."""


@dataclass(slots=True)
class Arguments:
    """The arguments of a call, as the caller passed them; `FusedLayer.forward` documents them.

    `normalise` converts them to a `Call`.
    """

    input: Any
    hx: Any = None
    lengths: Lengths | None = None
    reset: Tensor | None = None
    reset_to: Any = None
    embedding: Tensor | None = None
    padding_idx: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """The arguments for `cell.inputs`, by name."""
    share_prefixes: bool | None = False
    """As in `last_state()`."""

    def keywords(self) -> dict[str, Any]:
        """Returns the non-None arguments after hx by name. The callee may not accept all names."""
        return given(
            lengths=self.lengths,
            reset=self.reset,
            reset_to=self.reset_to,
            embedding=self.embedding,
            padding_idx=self.padding_idx,
            **self.inputs,
        )

    def are_known_to_torch(self) -> bool:
        """Returns whether torch's own layer accepts these arguments, ignoring embedding."""
        return (
            self.lengths is None
            and self.reset is None
            and self.reset_to is None
            and not given(**self.inputs)
        )


def given(**arguments: Any) -> dict[str, Any]:
    """Returns the arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


class Lookup(NamedTuple):
    """The embedding of token ids, and whether sequences may share common prefixes."""

    embedding: Tensor
    """(vocabulary, input_size)"""
    padding_idx: int | None = None
    """The row of `embedding` that gets no gradient."""
    share_prefixes: bool | None = False
    """As in `last_state()`."""


@dataclass(slots=True)
class Call:
    """The arguments of the operators (see `namernn_fast.ops`), as `normalise` returns them.

    `dispatch.run` chooses a path and converts token ids for it. Paths do not modify a call.
    """

    cell: Cell
    weights: Sequence[Tensor]
    options: int
    data: Tensor
    """The operators' `input`."""
    sequence_layout: Tensor | None = None
    reset: Tensor | None = None
    states: Sequence[Tensor] = ()
    """The initial states: empty for zeros, otherwise one tensor for each of `cell.states`."""
    restart_states: Sequence[Tensor] = ()
    """The states that steps start from where `reset` is True: empty for zeros, otherwise one tensor
    (seq_len, num_layers, batch, features) for each of `cell.states`."""
    beside: Sequence[Tensor] = ()
    """Empty, or the inputs of the operators: one tensor for each of `cell.inputs`."""
    trees: int = 0
    dropout: float = 0.0
    """The probability of zeroing an element of the output of each layer except the last. The fused
    operators have no dropout, so `dispatch.run` splits the stack into layers."""
    recompute: int | None = None
    """The number of steps between the states that training keeps; None to keep all values."""
    prepared: "PreparedWeights | None" = None
    """The weights of a prepared layer. `weights` then has only shapes, without values."""
    lookup: Lookup | None = None
    """If data holds token ids, the embedding to look them up in."""
    has_tables: bool = False
    """Whether `weights` has tables instead of weight_ih of the first layer."""

    def requires_grad(self) -> bool:
        """Returns whether any floating-point tensor of the call requires a gradient."""
        tensors = self.data, *self.states, *self.restart_states, *self.beside, *self.weights
        return any(tensor.requires_grad for tensor in tensors)

    @property
    def projects(self) -> bool:
        """Whether the layers have proj_size."""
        return self.options & ops.PROJECTIONS > 0

    @property
    def beyond_torch(self) -> bool:
        """Whether torch's own operators cannot run the call, or would wait for a GPU's lengths."""
        has_lengths = self.sequence_layout is not None and not self.options & ops.PACKED
        return self.reset is not None or has_lengths

    def convert_states(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Applies `convert` to each initial state and to each state after resets."""
        self.states = [convert(state) for state in self.states]
        self.restart_states = [convert(state) for state in self.restart_states]

    def initial_states(self, batch: int) -> Sequence[Tensor]:
        """Returns `states`, or zeros for `batch` sequences if it is empty."""
        if self.states:
            return self.states
        weights, directions = self.weights, ops.directions_of(self.options)
        rows = ops.layer_count(self.cell, weights, self.options) * directions, batch
        return [weights[-1].new_zeros(*rows, size) for size in self.state_sizes()]

    def _shaped(self) -> tuple[Cell, Sequence[Tensor], Tensor | None, int]:
        """Returns the arguments of `ops.hidden_size`."""
        reads_input = self.has_tables or self.options & ops.SUMS
        return self.cell, self.weights, self.data if reads_input else None, self.options

    def hidden_size(self) -> int:
        """Returns the number of hidden units."""
        return ops.hidden_size(*self._shaped())

    def state_sizes(self) -> list[int]:
        """Returns the number of features of each state."""
        return ops.state_sizes(*self._shaped())

    def states_of_layers(self, layers: int) -> Sequence[Sequence[Tensor]]:
        """Returns each layer's initial states, (directions, batch, features), or () for zeros."""
        if not self.states:
            return [()] * layers
        return [*zip(*(state.chunk(layers) for state in self.states), strict=True)]

    def joined(self, weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
        """Returns the operators' arguments `tensors` and `options` for these weights."""
        if not (self.states or self.restart_states or self.beside):
            return weights, self.options
        lists = ops.Lists(self.states, self.restart_states, self.beside, weights)
        return lists.joined(self.options)

    def flat(self) -> tuple[Any, ...]:
        """Returns the arguments of `FusedStack` and `vmap.Mapped` as a flat tuple.

        An `autograd.Function` ignores tensors inside nested tuples. So the tuple ends with data and
        with each tensor of the operators' `tensors`.
        """
        tensors, options = self.joined(self.weights)
        described = self.cell.number, self.cell.program, options, self.trees
        return *described, self.sequence_layout, self.reset, self.data, *tensors

    @classmethod
    def of_flat(cls, arguments: Sequence[Any]) -> "Call":
        """Restores a call from the result of `flat`."""
        number, program, options, trees, layout, reset, data, *tensors = arguments
        cell = find_cell(number, program)
        states, restart_states, beside, weights = ops.split(cell, tensors, options)
        options &= ~(ops.STATES | ops.RESET_TO | ops.INPUTS)
        return cls(
            cell,
            weights,
            options,
            data,
            sequence_layout=layout,
            reset=reset,
            states=states,
            restart_states=restart_states,
            beside=beside,
            trees=trees,
            has_tables=ops.has_ids(data),
        )


Results: TypeAlias = tuple[Tensor, ...]
"""The results of a call: output, and the last state for each of `cell.states`."""
Path: TypeAlias = Callable[[Call], Results]
"""A function that computes a call. With LAST_STATE, it may return any tensor as output."""


class Choice(NamedTuple):
    """The path chosen for a call, and why each other path was not chosen."""

    path: Path
    why_not_kernel: str | None = None
    """Why no fused kernel can take the call; None if one can."""
    why_not_torch: str | None = None
    """Why torch's own operator cannot take the call either; None if it or a fused kernel can."""
    why_not_ids: str | None = None
    """Why the path cannot take token ids, only rows of features; None if it takes both."""
