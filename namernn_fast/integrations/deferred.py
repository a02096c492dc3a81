"""Runs code once another module has been imported, without importing it.

`torch._dynamo` takes seconds to import, and most programs never use it.
"""

import importlib.abc
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..machine.torch_private import tried

Action = Callable[[Any], object]

_waiting: dict[str, list[tuple[Action, str]]] = {}
"""For each module that has not been executed yet, by name, the actions and their purposes."""


def when_imported(name: str, action: Action, purpose: str) -> None:
    """Calls `action(module)` after module `name` is executed, or now if it already has been.

    An error in the action becomes a warning, so that the import of the module does not fail.

    Args:
        name: the name of the module.
        action: the function to call.
        purpose: what the action does, for the warning.
    """
    if name in sys.modules:
        _attempt(action, purpose, sys.modules[name])
        return
    _waiting.setdefault(name, []).append((action, purpose))
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def _attempt(action: Action, purpose: str, module: ModuleType) -> None:
    try:
        action(module)
    except Exception as error:
        message = f"namernn_fast cannot {purpose}: {type(error).__name__}: {error}. {tried()}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that actions wait for, and runs the actions once a module is executed.

    Finding a module runs no action, because tools also search for modules that they never execute.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        # Ask only later finders. Otherwise, two such finders would call each other forever.
        later = itertools.dropwhile(lambda finder: finder is not self, [*sys.meta_path])
        for finder in itertools.islice(later, 1, None):
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find and find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _run_actions_after(spec.loader)
                return spec
        return None


_FINDER = _Finder()


def _run_actions_after(loader: Any) -> None:
    """Makes a loader run a module's actions after it has executed the module."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        for action, purpose in _waiting.pop(module.__name__, ()):
            _attempt(action, purpose, module)

    loader.exec_module = exec_module
