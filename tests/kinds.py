"""The kinds of cells: what each is called here and in torch, for tests that all must pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import namernn_fast
from namernn_fast import ops


class Kind(NamedTuple):
    """One kind of cell."""

    name: str
    layer: type[torch.nn.RNNBase]
    cell: type[torch.nn.RNNCellBase]
    tokens: type[torch.nn.Module]
    run: Callable[..., Any]
    nn_layer: type[torch.nn.RNNBase]
    nn_cell: type[torch.nn.RNNCellBase]

    @property
    def gates(self) -> int:
        return ops.GATES[self.name]

    @property
    def forward(self) -> str:
        """The name of the forward operator in `namernn_fast.ops`."""
        return f"{self.name}_forward"

    @property
    def has_cell_state(self) -> bool:
        return ops.HAS_CELL_STATE[self.name]

    def states(self, make: Callable[..., torch.Tensor], *size: int, **options: Any) -> Any:
        """Returns states as a layer takes them, each `make(*size)`: one, or the pair of h and c."""
        made = tuple(make(*size, **options) for _ in range(1 + self.has_cell_state))
        return made if self.has_cell_state else made[0]

    @property
    def without_kernel(self) -> str:
        """The path of a layer on a device without a kernel, as `explain` calls it."""
        return "reference" if self.name == "rnn" else "torch"

    def known(self, options: dict) -> dict:
        """Returns the options without those that layers of this kind lack."""
        lacking = () if self.name == "rnn" else ("nonlinearity",)
        return {name: value for name, value in options.items() if name not in lacking}

    def twins(self, *args, **options):
        """Returns a fused layer and torch's with equal weights."""
        theirs = self.nn_layer(*args, **options)
        ours = self.layer(*args, **options)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs


KINDS = {
    "rnn": Kind(
        "rnn",
        namernn_fast.FusedRNN,
        namernn_fast.FusedRNNCell,
        namernn_fast.TokenRNN,
        namernn_fast.rnn,
        torch.nn.RNN,
        torch.nn.RNNCell,
    ),
    "gru": Kind(
        "gru",
        namernn_fast.FusedGRU,
        namernn_fast.FusedGRUCell,
        namernn_fast.TokenGRU,
        namernn_fast.gru,
        torch.nn.GRU,
        torch.nn.GRUCell,
    ),
    "lstm": Kind(
        "lstm",
        namernn_fast.FusedLSTM,
        namernn_fast.FusedLSTMCell,
        namernn_fast.TokenLSTM,
        namernn_fast.lstm,
        torch.nn.LSTM,
        torch.nn.LSTMCell,
    ),
}


def tensors_in(states: Any) -> tuple[torch.Tensor, ...]:
    """Returns the tensors of states as a layer takes and returns them: one, or the pair of h, c."""
    if states is None:
        return ()
    return states if isinstance(states, tuple) else (states,)


def flat(results: tuple) -> tuple[Any, ...]:
    """Returns a layer's results in one tuple: output, h_n and, for an LSTM, c_n."""
    output, states = results
    return output, *tensors_in(states)


def map_states(states: Any, convert: Callable[..., torch.Tensor], *more: Any) -> Any:
    """Converts a state, or each of the pair of h and c, together with those of `more`."""
    if isinstance(states, tuple):
        return tuple(map(convert, states, *more))
    return convert(states, *more)


def states_of(kind: Kind, hx: Any) -> Any:
    """Returns hx as a layer takes it: for an LSTM hx twice, as h and c."""
    return (hx, hx) if kind.has_cell_state and hx is not None else hx


def said_of(kind: Kind, text: str) -> str:
    """Returns a pattern for nn.RNN's error about hx, reworded as nn.LSTM words it for a pair."""
    if kind.has_cell_state:
        text = text.replace("hx should", "hx and cx should").replace("got 2-D", r"got \(2-D, 2-D\)")
        text = text.replace("hidden size", r"hidden\[0\] size").replace("Tensor or None", "Tensor")
    return text


def kind_of(module: torch.nn.Module) -> Kind:
    """Returns the kind of a layer, fused or torch's."""
    return next(kind for kind in KINDS.values() if isinstance(module, kind.nn_layer))
