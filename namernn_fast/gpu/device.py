"""The properties of a GPU that decide how kernels run."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """A GPU, as far as plans and launches depend on it."""

    backend: str
    """`cuda`, or `hip`."""
    arch: str
    """`sm_90`, or `gfx942`."""
    shared: int
    """Bytes of shared memory that one program can have."""
    processors: int
    """Streaming multiprocessors, or compute units."""

    @property
    def meeting(self) -> int:
        """How many programs may wait for each other.

        One on AMD, where Triton's barrier within a program does not wait until the stores of all of
        its warps are done: other programs could read old values.
        """
        return self.processors if self.backend == "cuda" else 1

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 32 if self.backend == "cuda" else 64


@functools.cache
def find_device(index: int) -> Device:
    """Returns the GPU with this index, as torch counts them."""
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Device("hip", arch, 64 * 1024, properties.multi_processor_count)
    return Device(
        "cuda",
        f"sm_{properties.major}{properties.minor}",
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def device_of(tensor: Tensor) -> Device:
    """Returns the GPU that a tensor is on."""
    return find_device(tensor.get_device())


def may_round_to_tf32(device: Device) -> bool:
    """Returns whether torch's own setting lets an RNN round float32 to TF32; never on AMD."""
    rnn: Any = torch.backends.cudnn.rnn
    return device.backend == "cuda" and rnn.fp32_precision == "tf32"
