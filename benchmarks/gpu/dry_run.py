"""Runs the benchmark's code on a CPU, with the GPU kernels in Triton's interpreter."""

from collections import Counter
from functools import partial
from typing import Any

import torch

from namernn_fast import gpu, ops
from namernn_fast.machine import availability

ARGUMENTS = {"forward": ops.ForwardArguments, "backward": ops.BackwardArguments}
library = torch.library.Library(ops.NAMESPACE, "IMPL")
"""Keeps the implementations registered."""
calls: Counter[str] = Counter()
"""How often each operator has run in the interpreter."""


def run(name: str, *values: Any) -> Any:
    """Runs an operator for GPUs."""
    calls[name] += 1
    return getattr(gpu, name)(ARGUMENTS[name](*values))


def why_not_kernel(input: torch.Tensor, cell: Any, call: Any = None) -> str | None:
    """Returns why no GPU kernel would run a call, or None."""
    return availability.why_not_gpu_kernel(cell, input.dtype, call)


def treat_cpu_as_gpu() -> None:
    """Makes calls with CPU tensors take the path of GPU tensors, for the rest of the process."""
    for name in ARGUMENTS:
        library.impl(name, partial(run, name), "CPU", allow_override=True)
    availability.why_not_kernel = why_not_kernel
