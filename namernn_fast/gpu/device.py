"""The properties of a GPU that determine how kernels run."""

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..machine import fp32_precision


class Device(NamedTuple):
    """The properties of a GPU that plans and launches depend on."""

    backend: str
    """`cuda` or `hip`."""
    arch: str
    """The architecture, for example `sm_90` or `gfx942`."""
    shared: int
    """Bytes of shared memory available to one program."""
    processors: int
    """The number of streaming multiprocessors or compute units."""
    cooperative: bool = True
    """Whether cooperative launches are allowed. False after the GPU has rejected such a launch."""

    @property
    def meeting(self) -> int:
        """The maximum number of programs that may meet at a barrier.

        The maximum is 1 if the GPU has rejected a cooperative launch. It is also 1 on AMD, where
        other programs could read stale values, because Triton's barrier within a program does not
        wait for the stores of all warps.
        """
        return self.processors if self.backend == "cuda" and self.cooperative else 1

    def most_registers(self, warps: int, programs: int = 1) -> int:
        """Returns the register limit per thread if `programs` programs share an NVIDIA SM."""
        return min(255, 65536 // (programs * warps * self.lanes))

    @property
    def lanes(self) -> int:
        """The number of threads per warp."""
        return 32 if self.backend == "cuda" else 64


@functools.cache
def find_device(index: int) -> Device:
    """Returns the `Device` that describes the GPU with this index in torch."""
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
"""The indices of GPUs that rejected a cooperative launch."""


def device_of(tensor: Tensor) -> Device:
    """Returns the `Device` that describes the GPU of a tensor."""
    index = tensor.get_device()
    device = find_device(index)
    return device._replace(cooperative=False) if index in _refusing else device


def let_no_programs_meet(tensor: Tensor, error: RuntimeError) -> None:
    """Records that a GPU rejected a cooperative launch. Warns once per GPU and process."""
    index = tensor.get_device()
    if index not in _refusing:
        _refusing.add(index)
        warnings.warn(
            f"namernn_fast: {tensor.device} refused a cooperative launch ({error}). This happens "
            "if only part of the GPU is available, as under NVIDIA's multi-process service or in "
            "a green context. From now on, kernels on this GPU run without cooperation and read "
            "weight_hh at every step, which is slower for large hidden sizes",
            RuntimeWarning,
            stacklevel=2,
        )


def may_round_to_tf32(device: Device) -> bool:
    """Returns whether torch's setting lets an RNN round float32 to TF32; always False on AMD."""
    return device.backend == "cuda" and fp32_precision.of_rnns() == "tf32"
