"""The private names of torch that this package uses. No other module uses private names.

A later torch may lack one of these names. The package then uses a substitute. Without a substitute,
importing the package still works, but using the name raises an error.
`tests/install/test_installed.py` checks that every tested torch has all these names.
"""

import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

OLDEST, NEWEST = "2.10", "2.15"
"""The oldest and the newest torch that this package was tested with."""

absent: list[str] = []
"""The names that this torch lacks."""


def tried() -> str:
    """Returns a sentence that compares this torch with the tested versions."""
    return f"This is torch {torch.__version__}; namernn_fast was tested with {OLDEST} to {NEWEST}"


class _Absent:
    """Stands for a name that this torch lacks; raises an error when it is called or read."""

    def __init__(self, name: str) -> None:
        self._message = (
            f"namernn_fast needs {name}, which this torch lacks. {tried()}. Install one of these"
        )

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        raise RuntimeError(self._message)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self._message)


def _find(path: str, instead: Any = None) -> Any:
    """Returns the object in torch that a dotted name refers to.

    If torch lacks it, returns `instead`, or an object that raises an error when it is used.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError):
        absent.append(path)
        return _Absent(path) if instead is None else instead


def _is_autocast_on() -> bool:
    accelerator = torch.accelerator.current_accelerator()
    devices = "cpu", "cuda" if accelerator is None else accelerator.type
    return any(map(torch.is_autocast_enabled, devices))


def _public_precision(backend: str, operator: str) -> str:
    return getattr(getattr(torch.backends, backend), operator).fp32_precision  # type: ignore[no-any-return]


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


# Functions and classes keep torch's names. Callers import each by name, so that each use costs
# one global lookup.
_are_functorch_transforms_active: Callable[[], bool] = _find(
    "torch._C._are_functorch_transforms_active"
)
_get_tracing_state: Callable[[], object] = _find(
    "torch._C._get_tracing_state",
    lambda: torch.jit.is_tracing() or None,  # type: ignore[attr-defined,no-untyped-call,unused-ignore]
)
"""Returns None if TorchScript is not tracing. Faster than `torch.jit.is_tracing`."""
_set_tracing_state: Callable[[object], None] = _find("torch._C._set_tracing_state")
_is_any_autocast_enabled: Callable[[], bool] = _find(
    "torch._C._is_any_autocast_enabled", _is_autocast_on
)
_get_fp32_precision_getter: Callable[[str, str], str] = _find(
    "torch._C._get_fp32_precision_getter", _public_precision
)
_foreach_copy_: Callable[[Sequence[Tensor], Sequence[Tensor]], object] = _find(
    "torch._foreach_copy_", _copy_each
)
_assert_async: Callable[[Tensor, str], None] = _find("torch._assert_async")
DispatchKey: Any = _find("torch._C.DispatchKey")
_dispatch_keys: Callable[[Tensor], Any] = _find("torch._C._dispatch_keys")

# If one of these functions is missing, steps run as operators, which modes and profilers see.
_len_torch_dispatch_stack: Callable[[], int] = _find(
    "torch._C._len_torch_dispatch_stack", lambda: 1
)
_len_torch_function_stack: Callable[[], int] = _find(
    "torch._C._len_torch_function_stack", lambda: 1
)
_profiler_enabled: Callable[[], bool] = _find("torch._C._autograd._profiler_enabled", lambda: True)

_current_graph_task_id: Callable[[], int] = _find("torch._C._current_graph_task_id")
_will_engine_execute_node: Callable[[Any], bool] = _find("torch._C._will_engine_execute_node")

_FUNCTORCH = "torch._C._functorch"
TransformType: Any = _find(f"{_FUNCTORCH}.TransformType")
get_unwrapped: Callable[[Tensor], Tensor] = _find(f"{_FUNCTORCH}.get_unwrapped")
is_batchedtensor: Callable[[Tensor], bool] = _find(f"{_FUNCTORCH}.is_batchedtensor")
is_functorch_wrapped_tensor: Callable[[Tensor], bool] = _find(
    f"{_FUNCTORCH}.is_functorch_wrapped_tensor"
)
# Only `is_grads_batched` makes legacy batched tensors. A torch without this function has none.
is_legacy_batchedtensor: Callable[[Tensor], bool] = _find(
    f"{_FUNCTORCH}.is_legacy_batchedtensor", lambda _: False
)
maybe_get_level: Callable[[Tensor], int] = _find(f"{_FUNCTORCH}.maybe_get_level")

_PYFUNCTORCH = "torch._functorch.pyfunctorch"
retrieve_all_functorch_interpreters: Callable[[], list[Any]] = _find(
    f"{_PYFUNCTORCH}.retrieve_all_functorch_interpreters"
)
retrieve_current_functorch_interpreter: Callable[[], Any] = _find(
    f"{_PYFUNCTORCH}.retrieve_current_functorch_interpreter"
)

_disable_current_modes: Callable[[], AbstractContextManager[object]] = _find(
    "torch.utils._python_dispatch._disable_current_modes"
)
# If this function is missing, every call is assumed to run global hooks.
_has_any_global_hook: Callable[[], bool] = _find(
    "torch.nn.modules.module._has_any_global_hook", lambda: True
)
TorchDispatchMode: Any = _find("torch.utils._python_dispatch.TorchDispatchMode", object)
decomposition_table: Mapping[Any, Callable[..., Any]] = _find(
    "torch._decomp.decomposition_table", {}
)

forward_ad: Any = _find("torch.autograd.forward_ad")
"""Its `_current_level` is -1 outside of forward-mode AD. Callers read this attribute, because a
function would take longer."""
if not hasattr(forward_ad, "_current_level"):
    forward_ad = _find("torch.autograd.forward_ad._current_level")  # raises an error when read

Guard: Any = _find("torch._guards.Guard")
TracingContext: Any = _find("torch._guards.TracingContext")

DYNAMO = "torch._dynamo"
DYNAMO_BUILDER = "torch._dynamo.variables.builder"
EXPANDED_WEIGHTS = "torch.nn.utils._expanded_weights.expanded_weights_impl"
"""Modules of torch that `integrations.deferred` waits for."""

ATTRIBUTES = {
    "Module": (
        *("_apply", "_load_from_state_dict", "_save_to_state_dict", "_slow_forward"),
        *("_modules", "_parameters"),
        *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"),
    ),
    "RNNBase": ("_all_weights", "_flat_weights_names", "_init_flat_weights"),
    "Tensor": ("_backward_hooks", "_is_view", "_is_zerotensor", "_version"),
    "Function": ("_backward_cls",),
    "Node": ("_register_hook_dict",),
    "NestedTensor": ("_ragged_idx",),
}
"""Attributes of torch's objects, by class, that other modules read or override to change what torch
does."""

version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""Returns how often a tensor was changed in place."""


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor's class handles operators in `__torch_dispatch__`."""
    return _dispatch_keys(tensor).has(DispatchKey.Python)  # type: ignore[no-any-return]


def without_python(overload: Any) -> Callable[..., Any]:
    """Returns an operator without its Python wrapper, which takes 0.4 us but compilers need."""
    return getattr(overload, "_op", overload)  # type: ignore[no-any-return]


def before_first_hook(function: type, prepare: Callable[[Tensor], object]) -> None:
    """Calls `prepare(result)` before a result of an autograd.Function gets its first tensor hook.

    No-op if this torch lacks the private names that it needs.
    """
    node: Any = getattr(function, "_backward_cls", None)
    if hasattr(node, "_register_hook_dict"):

        def register(self: Any, result: Tensor) -> None:
            prepare(result)
            super(node, self)._register_hook_dict(result)

        node._register_hook_dict = register


_Function = TypeVar("_Function", bound=Callable[..., Any])


def called_by_dynamo(function: _Function) -> _Function:
    """Makes Dynamo call a function while it traces, and treat the result as a constant.

    Equivalent to `torch.compiler.assume_constant_result`, which would import all of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def recompile_unless(holds: Callable[[], bool], code: str) -> None:
    """While `torch.compile` traces, makes it recompile once a condition no longer holds.

    No-op in `torch.export`, because its programs never change.

    Args:
        holds: the condition, which is true now.
        code: the condition as text, for torch's log of recompilations.
    """
    context = TracingContext.try_get()
    if context is None:
        return

    def add(builder: Any, guard: Any) -> None:
        arguments: tuple[Any, ...] = lambda _: holds(), [code]
        add_guard = builder.guard_manager.root.add_lambda_guard
        try:
            add_guard(*arguments, None)
        except TypeError:  # torch 2.10 does not take the user's stack
            add_guard(*arguments)

    source = _find("torch._dynamo.source.GlobalStateSource")  # Dynamo is imported by now
    context.guards_context.dynamo_guards.add(Guard(source(), add))
