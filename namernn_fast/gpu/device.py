"""The properties of a GPU that decide how kernels run."""

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import fp32_precision


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
    cooperative: bool = True
    """Whether programs that wait for each other may be launched: none such was refused so far."""

    @property
    def meeting(self) -> int:
        """How many programs may wait for each other.

        One where their launch was refused, and on AMD, where Triton's barrier within a program does
        not wait until the stores of all of its warps are done: other programs could read old
        values.
        """
        return self.processors if self.backend == "cuda" and self.cooperative else 1

    def most_registers(self, warps: int, programs: int = 1) -> int:
        """Returns how many registers a thread can have, where programs share a processor of NVIDIA.

        Args:
            warps: of a program.
            programs: that share the processor.
        """
        return min(255, 65536 // (programs * warps * self.lanes))

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


_refusing: set[int] = set()
"""The indices of GPUs that refused to launch programs that wait for each other."""


def device_of(tensor: Tensor) -> Device:
    """Returns the GPU that a tensor is on."""
    index = tensor.get_device()
    device = find_device(index)
    return device._replace(cooperative=False) if index in _refusing else device


def let_no_programs_meet(tensor: Tensor, error: RuntimeError) -> None:
    """Notes for the rest of the process that the GPU of a tensor refused a cooperative launch.

    It warns of it, once for each GPU.
    """
    index = tensor.get_device()
    if index not in _refusing:
        _refusing.add(index)
        warnings.warn(
            f"namernn_fast: {tensor.device} refused a cooperative launch ({error}), as it may with "
            "a part of its processors, under NVIDIA's multi-process service or in a green context. "
            "From now on each program runs on its own there and reads weight_hh at every step, "
            "which takes longer for large hidden sizes",
            RuntimeWarning,
            stacklevel=2,
        )


def may_round_to_tf32(device: Device) -> bool:
    """Returns whether torch's own setting lets an RNN round float32 to TF32; never on AMD."""
    return device.backend == "cuda" and fp32_precision.of_rnns() == "tf32"
