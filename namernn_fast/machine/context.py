"""The context of a call: compilers, tracers, transforms, autocast, modes and profilers.

Other modules ask only this module. Torch's functions are aliased, not wrapped, to avoid overhead.
"""

from torch.compiler import is_compiling as is_compiling
from torch.compiler import is_dynamo_compiling as is_dynamo_compiling
from torch.compiler import is_exporting as is_exporting

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

autocast_is_on = _is_any_autocast_enabled
"""Returns whether autocast is on for any device."""
functorch_is_active = _are_functorch_transforms_active
"""Returns whether a torch.func transform is active."""
jit_tracer = _get_tracing_state
"""Returns the state of `torch.jit.trace`, or of torch's older ONNX exporter, or None."""


def is_jit_tracing() -> bool:
    """Returns whether TorchScript is tracing. Faster than `torch.jit.is_tracing`."""
    return jit_tracer() is not None


def is_transformed() -> bool:
    """Returns whether forward-mode AD or a torch.func transform is active."""
    return forward_ad._current_level >= 0 or functorch_is_active()


def only_vmap_is_active() -> bool:
    """Returns whether forward-mode AD and all torch.func transforms except `vmap` are inactive."""
    return forward_ad._current_level < 0 and all(
        i.key() == TransformType.Vmap for i in retrieve_all_functorch_interpreters()
    )


def is_eager() -> bool:
    """Returns whether no compiler or tracer records the call, and no transform is active."""
    return (
        not is_compiling()
        and jit_tracer() is None
        and not functorch_is_active()
        and forward_ad._current_level < 0
    )


def is_unobserved() -> bool:
    """Returns whether no compiler, transform, mode or profiler has to see what a call runs.

    Ignores autocast and gradients.
    """
    return (
        not is_dynamo_compiling()
        and jit_tracer() is None
        and not functorch_is_active()
        and forward_ad._current_level < 0
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and not _profiler_enabled()
    )
