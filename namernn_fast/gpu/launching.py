"""Launching kernels: the one place where this package calls Triton to run something."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transfers import is_capturing
from .kernels import upload_kernel

_UPLOADED = 64  # numbers of a launch
UPLOAD_SETTINGS = {"num_warps": 1, "enable_fp_fusion": False}
"""How Triton is to compile and launch the kernel of `upload`."""


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
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
    return out.flatten().narrow(0, 0, len(numbers))


# What the driver says of CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE and CUDA_ERROR_NOT_SUPPORTED.
_REFUSALS = ("too many blocks in cooperative launch", "operation not supported")


def is_refusal(error: RuntimeError) -> bool:
    """Returns whether an error of a cooperative launch says that the device takes none like it."""
    return any(text in str(error) for text in _REFUSALS)


_lock = threading.RLock()  # a hook of Triton's at a launch may make another call
_last: dict[torch.device, dict[torch.cuda.Stream, torch.cuda.Event | None]] = {}
"""For each device, the streams whose cooperative kernels may run at the same time: those of the
last launches. The event of a stream is behind its last cooperative kernel."""


@contextlib.contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Returns a context for the launch of one cooperative kernel on the current stream.

    The kernel waits for the cooperative kernels that this process has launched on other streams:
    the CUDA documentation says that all programs of one such kernel run at once, and nothing of two
    kernels of which each has some of its programs running and waits for the others. A graph is
    replayed at times and on streams that are unknown here, so nothing waits during a capture.
    """
    if device.type != "cuda" or is_capturing(device):
        yield
        return
    stream = torch.cuda.current_stream(device)
    with _lock:
        last = _wait_for_others(device, stream)
        yield
        event = last.get(stream) or torch.cuda.Event()
        event.record(stream)
        last[stream] = event


def share_turn(
    device: torch.device, stream: torch.cuda.Stream, others: Iterable[torch.cuda.Stream]
) -> None:
    """Lets cooperative kernels of several streams run at once, since all of their programs fit.

    Args:
        device: the device.
        stream: its current stream, on which `others` wait.
        others: streams.
    """
    if is_capturing(device):
        return
    with _lock:
        last = _wait_for_others(device, stream)
        for own in (stream, *others):
            last.setdefault(own, None)


def _wait_for_others(
    device: torch.device, stream: torch.cuda.Stream
) -> dict[torch.cuda.Stream, torch.cuda.Event | None]:
    """Lets a stream wait for the cooperative kernels of others; returns the streams of its turn."""
    last = _last.setdefault(device, {})
    if stream not in last:
        for event in last.values():
            if event is not None:
                stream.wait_event(event)
        last.clear()
    return last
