"""Lets `torch.compile` trace the fused layers.

Dynamo breaks the graph at `nn.RNN` and its subclasses unless the option `allow_rnn` is set. Setting
this option globally would also make Dynamo unroll the user's own `nn.RNN`, `nn.GRU` and `nn.LSTM`.
So the option is set only while Dynamo wraps a fused layer. If a torch version lacks the method that
is patched here, Dynamo's own message says how to set the option.
"""

import functools
from types import ModuleType
from typing import Any

from ..machine.torch_private import DYNAMO_BUILDER
from .deferred import when_imported


def allow_tracing(*classes: type) -> None:
    """Makes Dynamo trace `classes`, subclasses of torch's layers, like any other modules."""
    purpose = "let torch.compile trace the fused layers"
    when_imported(DYNAMO_BUILDER, lambda builder: _patch(builder, classes), purpose)


def _patch(builder: ModuleType, classes: tuple[type, ...]) -> None:
    """Patches Dynamo's `VariableBuilder.wrap_module`, if this torch version has that method."""
    variable_builder: Any = getattr(builder, "VariableBuilder", None)
    original = getattr(variable_builder, "wrap_module", None)
    if original is None:
        return

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, classes):
            return original(self, value)
        with builder.config.patch(allow_rnn=True):
            return original(self, value)

    variable_builder.wrap_module = wrap_module
