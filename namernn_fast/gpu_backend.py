"""Registers the operators on GPUs. The first call imports their implementation."""

from types import ModuleType
from typing import Any

import torch

from . import ops
from .cells import NUMBERED
from .machine import availability


def implementation(device: torch.device) -> ModuleType:
    """Returns the package that implements the operators on a GPU, which the first call imports.

    Raises:
        RuntimeError: Triton is missing or too old, or the GPU is too old.
    """
    why_not = availability.why_not_triton(device)
    if why_not is not None:
        raise RuntimeError(f"{ops.NAMESPACE}: {why_not}, or move the layer and its input to a CPU")
    from . import gpu

    return gpu


def architecture(device: torch.device) -> str:
    """Returns the name of a GPU's architecture, for example `sm_90` or `gfx942`."""
    if torch.version.hip:
        properties: Any = torch.cuda.get_device_properties(device)
        return str(properties.gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _implementation_of(call: ops.AnyArguments) -> Any:
    """Returns the implementation for a call.

    Raises:
        RuntimeError: the GPU kernels do not support the cell or the device.
    """
    if call.program is None and not 0 <= call.cell < len(NUMBERED):
        raise RuntimeError(
            f"{ops.NAMESPACE}: cell must be between 0 and {len(NUMBERED) - 1}, got {call.cell}"
        )
    cell = call.described
    if cell.program is None and cell.equation is None:
        raise RuntimeError(f"{ops.NAMESPACE}: {availability.why_not_gpu_kernel(cell)}")
    return implementation(call.input.device)


@torch.library.impl(ops.library, "forward", "CUDA")
def _(*arguments: Any) -> Any:
    call = ops.ForwardArguments(*arguments)
    return _implementation_of(call).forward(call)


@torch.library.impl(ops.library, "backward", "CUDA")
def _(*arguments: Any) -> Any:
    call = ops.BackwardArguments(*arguments)
    return _implementation_of(call).backward(call)
