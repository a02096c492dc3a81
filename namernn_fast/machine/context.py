"""What surrounds a call: compilers, tracers, transforms, autocast, modes and profilers.

Every question about them is answered here. Names that only rename a function of torch cost no
call of their own.
"""

from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from .torch_private import (
    TransformType,
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _profiler_enabled,
    forward_ad,
    retrieve_all_functorch_interpreters,
)

__all__ = [
    "autocast_is_on",
    "functorch_is_active",
    "is_compiling",
    "is_dynamo_compiling",
    "is_eager",
    "is_exporting",
    "is_jit_tracing",
    "is_transformed",
    "is_unobserved",
    "only_vmap_is_active",
]

autocast_is_on = _is_any_autocast_enabled
"""Returns whether autocast is on for any device."""
functorch_is_active = _are_functorch_transforms_active
"""Returns whether a torch.func transform is active."""


def is_jit_tracing() -> bool:
    """Returns whether `torch.jit.trace`, or torch's older ONNX exporter, records the call."""
    return _get_tracing_state() is not None  # quicker than torch.jit.is_tracing


def is_transformed() -> bool:
    """Returns whether forward-mode AD or a torch.func transform is active."""
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def only_vmap_is_active() -> bool:
    """Returns whether every active torch.func transform is `vmap`, without forward-mode AD."""
    return forward_ad._current_level < 0 and all(
        i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters()
    )


def is_eager() -> bool:
    """Returns whether no compiler or tracer records the call, and no transform is active."""
    return (
        not is_compiling()
        and _get_tracing_state() is None
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_unobserved() -> bool:
    """Returns whether no compiler, transform, mode or profiler has to see what a call runs.

    Autocast and gradients are not asked for.
    """
    return (
        not is_dynamo_compiling()
        and _get_tracing_state() is None
        and not _are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and not _profiler_enabled()
    )
