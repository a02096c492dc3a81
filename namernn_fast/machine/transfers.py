"""Copies small CPU tensors to a GPU, except while a CUDA graph is captured.

A captured copy would read the CPU's memory again at every replay. By then, that memory may have
been freed or overwritten.
"""

import torch
from torch import Tensor

from .torch_private import is_functorch_wrapped_tensor


def is_capturing(device: torch.device) -> bool:
    """Returns whether the current stream of a device is being captured into a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_gpu(values: Tensor, device: torch.device, name: str) -> Tensor:
    """Copies a CPU tensor to a GPU asynchronously, through pinned memory.

    Args:
        values: a CPU tensor, which the caller may modify as soon as this function returns.
        device: the GPU.
        name: the argument's name, for the error message.

    Raises:
        RuntimeError: the current stream is being captured into a CUDA graph.
    """
    if is_capturing(device):
        raise RuntimeError(
            f"{name} must be a tensor on {device} while a CUDA graph is captured, got a tensor on "
            "the CPU, whose memory would be read again at every replay: call "
            f"{name}.to({str(device)!r}) before the capture"
        )
    # Fake and torch.func tensors have no memory that could be pinned.
    if type(values) is Tensor and not is_functorch_wrapped_tensor(values):
        values = torch.empty_like(values, pin_memory=True).copy_(values)
    return values.to(device, non_blocking=True)
