"""Launching kernels: the one place where this package calls Triton to run something."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import upload_kernel

_UPLOADED = 64  # numbers of a launch
UPLOAD_SETTINGS = {"num_warps": 1, "enable_fp_fusion": False}
"""How Triton is to compile and launch the kernel of `upload`."""


def run(kernel, grid: tuple[int, ...], arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    """Launches a kernel.

    Args:
        kernel: a function that Triton compiles.
        grid: the number of programs in each of up to three dimensions.
        arguments: by name, the kernel's arguments, and those for which it is compiled.
        settings: by name, how Triton is to compile and launch the kernel.
    """
    kernel[grid](**arguments, **settings)


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Returns numbers, from 0 to 2^30 - 2, as int64 on a GPU, without reading memory of the CPU.

    So a CUDA graph may hold it: they are arguments of the kernels that are launched.
    """
    launches = -(-len(numbers) // _UPLOADED)
    out = torch.empty(launches, _UPLOADED, dtype=torch.int64, device=device)
    padded = [*numbers, *[0] * (out.numel() - len(numbers))]
    for i, part in enumerate(out.unbind(0)):
        values = tuple(2 * v + 3 for v in padded[i * _UPLOADED : (i + 1) * _UPLOADED])
        run(upload_kernel, (1,), {"out": part, "values": values}, UPLOAD_SETTINGS)
    return out.flatten()[: len(numbers)]
