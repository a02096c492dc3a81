"""Launches kernels: all Triton launches of this package go through here."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..machine.transfers import is_capturing
from .kernels import upload_kernel

_UPLOADED = 64  # numbers copied per launch
UPLOAD_SETTINGS = {"num_warps": 1, "enable_fp_fusion": False}
"""Triton's compile and launch options for `upload_kernel`."""


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Launches a Triton kernel. `settings` holds compile and launch options.

    `grid` is the number of programs in each of up to three dimensions.
    """
    kernel[grid](**arguments, **settings)


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Returns an int64 tensor on a GPU that holds `numbers`, each between 0 and 2^30 - 2.

    The numbers are passed as kernel arguments, so a CUDA graph can capture the upload, and nothing
    reads CPU memory after this function returns.
    """
    launches = -(-len(numbers) // _UPLOADED)
    out = torch.empty(launches, _UPLOADED, dtype=torch.int64, device=device)
    padded = [*numbers, *[0] * (out.numel() - len(numbers))]
    for i, part in enumerate(out.unbind(0)):
        values = tuple(2 * v + 3 for v in padded[i * _UPLOADED : (i + 1) * _UPLOADED])
        run(upload_kernel, (1,), {"out": part, "values": values}, UPLOAD_SETTINGS)
    return out.flatten().narrow(0, 0, len(numbers))


# The driver's messages for CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE and CUDA_ERROR_NOT_SUPPORTED.
_REFUSALS = ("too many blocks in cooperative launch", "operation not supported")


def is_refusal(error: RuntimeError) -> bool:
    """Returns whether an error means that the device rejected a cooperative launch."""
    return any(text in str(error) for text in _REFUSALS)


_lock = threading.RLock()  # re-entrant, because a Triton launch hook may itself run a layer
_last: dict[torch.device, dict[torch.cuda.Stream, torch.cuda.Event | None]] = {}
"""For each device, the streams of the last cooperative launches, whose kernels may run
concurrently. Each stream's event is recorded after its last cooperative kernel."""


@contextlib.contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Returns a context for the launch of one cooperative kernel on the current stream.

    The kernel waits for the cooperative kernels that this process has launched on other streams.
    CUDA guarantees that all programs of one cooperative kernel run at once. But two such kernels
    can deadlock if running programs of each wait for programs that cannot start. During a capture,
    the kernel does not wait, because the time and stream of the graph's replay are unknown.
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
    """Lets cooperative kernels on the current `stream` of a GPU and on `others` run at once.

    The programs of all these kernels must fit on the device together. The caller must make `others`
    wait for `stream`.
    """
    if is_capturing(device):
        return
    with _lock:
        last = _wait_for_others(device, stream)
        for sharing in (stream, *others):
            last.setdefault(sharing, None)


def _wait_for_others(
    device: torch.device, stream: torch.cuda.Stream
) -> dict[torch.cuda.Stream, torch.cuda.Event | None]:
    """Makes a stream wait for cooperative kernels on streams that do not share its turn.

    Returns the entry of `_last` for the device.
    """
    last = _last.setdefault(device, {})
    if stream not in last:
        for event in last.values():
            if event is not None:
                stream.wait_event(event)
        last.clear()
    return last
