"""Small CPU tensors on their way to a GPU, and CUDA graphs, which must not hold such a copy.

A captured copy reads the CPU's memory again at every replay, when it may be freed or hold other
values.
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


def is_capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph captures the current stream of a device."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_gpu(values: Tensor, device: torch.device, name: str) -> Tensor:
    """Copies a CPU tensor to a GPU, from pinned memory, so that neither waits for the other.

    Args:
        values: on the CPU. They may be changed as soon as this function has returned.
        device: the GPU.
        name: of the argument, for the error.

    Raises:
        RuntimeError: a CUDA graph captures the current stream.
    """
    if is_capturing(device):
        raise RuntimeError(
            f"{name} must be a tensor on {device} while a CUDA graph is captured, got it on the "
            "CPU, whose memory would be read again at every replay: make "
            f"{name}.to({str(device)!r}) before the capture"
        )
    # Fake tensors and those of torch.func have no memory of their own to pin.
    if type(values) is Tensor and not is_functorch_wrapped_tensor(values):
        values = torch.empty_like(values, pin_memory=True).copy_(values)
    return values.to(device, non_blocking=True)
