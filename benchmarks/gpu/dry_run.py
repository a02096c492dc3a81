"""The dry run: the benchmark's own code on a CPU, with kernels under Triton's interpreter."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.resources import H100
from benchmarks.harness.grid import TRAINING
from namernn_fast import availability, gpu, ops
from namernn_fast.bench.workload import Input, call_of, draw_gradients
from namernn_fast.gpu import device as gpu_device
from namernn_fast.gpu.device import Device
from namernn_fast.testing import BudgetError

OPERATORS = ("rnn_forward", "rnn_backward")


def restart_interpreted() -> None:
    """Starts this command again with the interpreter, which Triton chooses when it is imported."""
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})


def serve_cpu_tensors(
    device: Callable[[], Device], operator: Callable[[str], Callable[..., Any]]
) -> torch.library.Library:
    """Routes the operators on CPU tensors to other implementations, for the rest of the process.

    The C++ extension need not be built.

    Args:
        device: Returns the GPU to make plans for.
        operator: Returns the implementation of an operator, by its name.

    Returns:
        What keeps the implementations registered.
    """
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name in OPERATORS:
        library.impl(name, operator(name), "CPU", allow_override=True)
    gpu_device.find_device = lambda index: device()
    availability.why_not_cpu_kernel = lambda input: None
    return library


class Interpreted:
    """Puts the Triton operators in the place of the CPU operators, and counts their calls.

    The change lasts as long as the process.
    """

    def __init__(self) -> None:
        self.calls = dict.fromkeys(OPERATORS, 0)
        # Any GPU would do to make plans for.
        self.library = serve_cpu_tensors(lambda: H100, lambda name: partial(self.run, name))

    def run(self, name: str, *arguments: Any) -> Any:
        """Counts and makes a call of an operator."""
        self.calls[name] += 1
        return getattr(gpu, name)(*arguments)

    def path(self, layer: nn.RNN, input: Input) -> str:
        """Names the path if a training step calls both Triton operators once.

        Raises:
            BudgetError: if it does not.
        """
        before = dict(self.calls)
        call_of(layer, input, TRAINING, draw_gradients(layer, input))()
        if any(self.calls[name] != before[name] + 1 for name in self.calls):
            raise BudgetError(f"Triton was not what ran: {before}, then {self.calls}")
        return "triton, interpreted"
