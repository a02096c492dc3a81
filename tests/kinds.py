"""The kinds of cells: what each is called here and in torch, for tests that all must pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
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
}


def kind_of(module: torch.nn.Module) -> Kind:
    """Returns the kind of a layer, fused or torch's."""
    return next(kind for kind in KINDS.values() if isinstance(module, kind.nn_layer))


def of_kinds(**params: list) -> list:
    """Returns parameters for `kind` and more: for each kind of cell its list of `pytest.param`."""
    return [
        pytest.param(KINDS[name], *param.values, marks=param.marks, id=f"{name}-{param.id}")
        for name, own in params.items()
        for param in own
    ]
