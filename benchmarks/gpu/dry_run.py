"""Runs the GPU benchmark's own code on a CPU, with kernels in Triton's interpreter."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from namernn_fast.gpu.device import Device
from torch import nn

from benchmarks.harness.grid import TRAINING
from namernn_fast import gpu, gpu_backend, ops
from namernn_fast.bench.timed_calls import Input, call_of, draw_gradients
from namernn_fast.gpu import device as gpu_device
from namernn_fast.machine import availability
from namernn_fast.testing import BudgetError

OPERATORS = ("forward", "backward")
H100 = Device("cuda", "sm_90", shared=227 * 1024, processors=132)
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def restart_interpreted() -> None:
    """Restarts this command with TRITON_INTERPRET, which Triton reads at import."""
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})


def on_cuda(name: str) -> Callable[..., Any]:
    """Returns an operator's CUDA implementation as a function of tensors on any device."""
    return partial(getattr(ops, name).redispatch, _CUDA)


def serve_cpu_tensors(
    device: Callable[[], Device], operator: Callable[[str], Callable[..., Any]]
) -> torch.library.Library:
    """Routes operators on CPU tensors to other implementations, for the rest of the process.

    This does not need the C++ extension. The operators make plans for `device()`, and run
    `operator(name)`. The returned library keeps the implementations registered.
    """
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name in OPERATORS:
        library.impl(name, operator(name), "CPU", allow_override=True)
    gpu_device.find_device = lambda index: device()
    gpu_backend.implementation = lambda device: gpu  # without looking for a GPU
    availability.why_not_cpu_kernel = lambda input: None
    return library


class Interpreted:
    """Replaces the CPU operators with the Triton operators, and counts their calls.

    The change lasts for the rest of the process.
    """

    def __init__(self) -> None:
        self.calls = dict.fromkeys(OPERATORS, 0)
        # Plans need the properties of some GPU.
        self.library = serve_cpu_tensors(lambda: H100, lambda name: partial(self.run, name))

    def run(self, name: str, *arguments: Any) -> Any:
        """Counts a call of an operator, and runs it on Triton."""
        self.calls[name] += 1
        return on_cuda(name)(*arguments)

    def path(self, layer: nn.RNN, input: Input) -> str:
        """Returns the name of the path, after checking that a training step runs on Triton.

        Raises:
            BudgetError: A training step does not call each Triton operator exactly once.
        """
        before = dict(self.calls)
        call_of(layer, input, TRAINING, draw_gradients(layer, input))()
        if any(self.calls[name] != before[name] + 1 for name in self.calls):
            raise BudgetError(f"a training step did not use Triton: {before}, then {self.calls}")
        return "triton, interpreted"
