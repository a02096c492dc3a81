"""Runs the operators of GPUs on CPU tensors, in Triton's interpreter, for tests and dry runs."""

from functools import partial
from typing import Any

import torch

from namernn_fast import ops


def serve_cpu_tensors() -> torch.library.Library:
    """Routes the operators on CPU tensors to the GPU kernels, for the rest of the process.

    Returns:
        The library that keeps the operators registered.

    Raises:
        RuntimeError: the environment variable TRITON_INTERPRET is not set.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set the environment variable TRITON_INTERPRET=1")
    from namernn_fast import gpu

    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name, read in ("forward", ops.ForwardArguments), ("backward", ops.BackwardArguments):
        run = partial(_run, getattr(gpu, name), read)
        library.impl(name, run, "CPU", allow_override=True)
    return library


def _run(operator: Any, read: Any, *arguments: Any) -> Any:
    return operator(read(*arguments))
