"""What the GPU kernels take of each architecture, compiled without a GPU: `make gpu-report`.

Every configuration that the rule in `namernn_fast/triton_kernels.py` chooses for the sizes below is
compiled for every architecture, and the registers, spills and shared memory of the result go into
docs/gpu_report.md.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from namernn_fast import triton_kernels
from namernn_fast.triton_kernels import Config, Device

PAGE = Path(__file__).parents[1] / "docs" / "gpu_report.md"

# As the makers' manuals have them: what one program can have of shared memory, and how many
# processors there are (A100, H100 SXM, B200, MI300X).
DEVICES = (
    Device("cuda", "sm_80", 163 * 1024, 108),
    Device("cuda", "sm_90", 227 * 1024, 132),
    Device("cuda", "sm_100", 227 * 1024, 148),
    Device("hip", "gfx942", 64 * 1024, 304),
)
HIDDEN_SIZES = (16, 64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 64, 1024, 16384)
# dtype, whether float32 may be rounded to TF32
PRECISIONS = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
)
KERNELS = {
    "forward": triton_kernels.forward_kernel,
    "backward": triton_kernels.backward_kernel,
}


class Build(NamedTuple):
    """One configuration on one device, for one hidden size."""

    device: Device
    hidden_size: int
    dtype: torch.dtype
    config: Config

    @property
    def precision(self) -> str:
        if self.dtype != torch.float32:
            return str(self.dtype).removeprefix("torch.")
        return "TF32" if self.config.precision == "tf32" else "float32"


class Resources(NamedTuple):
    """What one kernel takes."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""


def builds() -> Iterator[tuple[Build, list[int]]]:
    """Everything the rule chooses for the sizes above, with the batches that it is chosen for."""
    found: dict[Build, list[int]] = {}
    for device, (dtype, tf32), hidden_size, batch in itertools.product(
        DEVICES, PRECISIONS, HIDDEN_SIZES, BATCHES
    ):
        if tf32 and device.backend != "cuda":
            continue
        config = triton_kernels.choose(hidden_size, batch, dtype, device, tf32=tf32)
        found.setdefault(Build(device, hidden_size, dtype, config), []).append(batch)
    yield from found.items()


_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_ABSENT = (
    *("weight_hh_reverse", "bias_hh_reverse", "lengths", "offsets", "starts", "reset"),
    "reset_time",
    "reset_batch",
)


def compile_kernel(kernel, build: Build) -> Resources:
    """Compiles a kernel for dense input of one direction with biases and hx."""
    config, device = build.config, build.device
    constants = {
        "H": build.hidden_size,
        "DIRECTIONS": 1,
        "PADDED": False,
        "TANH": True,
        **triton_kernels.constants_of(config),
    }
    signature = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in _ABSENT or (name == "arrivals" and config.members == 1):
            constants.setdefault(name, None)
            signature[name] = "constexpr"
        elif name in triton_kernels.VARYING:
            signature[name] = "i32"
        else:
            signature[name] = "*i32" if name == "arrivals" else _POINTERS[build.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
    arch, lanes = (
        (int(device.arch.removeprefix("sm_")), 32)
        if device.backend == "cuda"
        else (device.arch, 64)
    )
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget(device.backend, arch, lanes),
        options=triton_kernels.options_of(config, device),
    )
    shared = compiled.metadata.shared
    if device.backend == "hip":
        text = compiled.asm["amdgcn"]
        read = {
            name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "agpr_count", "private_segment_fixed_size")
        }
        return Resources(read["vgpr_count"], read["private_segment_fixed_size"], shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.__file__).parent / "nvidia/bin/cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    read = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return Resources(read["REG"], read["STACK"] + read["LOCAL"], shared)
