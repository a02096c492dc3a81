"""Registers the operators on GPUs. The first call imports their implementation."""

import functools
from types import ModuleType
from typing import Any

import torch

from . import ops
from .cells import NUMBERED
from .machine import availability


@functools.cache
def implementation(device: torch.device) -> ModuleType:
    """Returns the package that implements the operators on a GPU, which the first call imports.

    Raises:
        RuntimeError: Triton is missing or too old, or the GPU is too old.
    """
    availability.require_triton(device)
    from . import gpu

    return gpu


def _implementation_of(call: ops.AnyArguments) -> Any:
    """Returns the implementation for a call.

    Raises:
        RuntimeError: the GPU kernels do not support the cell, the device or `reset_to` of the call.
    """
    if call.program is None and not 0 <= call.cell < len(NUMBERED):
        raise RuntimeError(
            f"{ops.NAMESPACE}: cell must be between 0 and {len(NUMBERED) - 1}, got {call.cell}"
        )
    restarts = call.options & ops.RESET_TO > 0
    why_not = availability.why_not_gpu_kernel(call.described, restarts)
    if why_not is not None:
        raise RuntimeError(f"{ops.NAMESPACE}: {why_not}")
    return implementation(call.input.device)


@torch.library.impl(ops.library, "forward", "CUDA")
def _(*arguments: Any) -> Any:
    call = ops.ForwardArguments(*arguments)
    return _implementation_of(call).forward(call)


@torch.library.impl(ops.library, "backward", "CUDA")
def _(*arguments: Any) -> Any:
    call = ops.BackwardArguments(*arguments)
    return _implementation_of(call).backward(call)
