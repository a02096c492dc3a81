"""Lets `torch.compile` trace FusedRNN.

Dynamo breaks the graph at `nn.RNN` and its subclasses unless Dynamo's option `allow_rnn` is set,
which would also let it unroll the user's own `nn.RNN`, `nn.GRU` and `nn.LSTM`. So the option is set
only while Dynamo looks at a FusedRNN. Dynamo takes long to import, and most programs never use it:
the patch waits until something else imports Dynamo. If a torch version has no such place to patch,
Dynamo's own message appears, which says how to set the option.
"""

import functools
import importlib.abc
import importlib.util
import sys
from typing import Any

BUILDER = "torch._dynamo.variables.builder"


def allow_tracing(module_class: type) -> None:
    """Makes Dynamo trace instances of `module_class` like any other module.

    Args:
        module_class: a subclass of `nn.RNN`.
    """
    if BUILDER in sys.modules:
        _patch(sys.modules[BUILDER], module_class)
    else:
        sys.meta_path.insert(0, _AfterImport(module_class))


def _patch(builder, module_class: type) -> None:
    """Wraps Dynamo's `VariableBuilder.wrap_module`, if there is such a method."""
    variable_builder: Any = getattr(builder, "VariableBuilder", None)
    original = getattr(variable_builder, "wrap_module", None)
    if original is None:
        return

    @functools.wraps(original)
    def wrap_module(self, value):
        if not isinstance(value, module_class):
            return original(self, value)
        with builder.config.patch(allow_rnn=True):
            return original(self, value)

    variable_builder.wrap_module = wrap_module


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds no module itself, but patches Dynamo's builder once that module has been executed."""

    def __init__(self, module_class: type):
        self.module_class = module_class

    def find_spec(self, name, path=None, target=None):
        if name != BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch(module, self.module_class)

        spec.loader.exec_module = exec_module
        return spec
