"""Reports whether the C++ extension, Triton and the GPU can be used, and why not."""

import contextlib
import functools
import importlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..cells import VANILLA, Cell

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MINIMUM = (3, 6)
CAPABILITY_MINIMUM = (8, 0)

_PACKAGE = __package__.partition(".")[0]
_IMPORTING = {_PACKAGE, "importlib", "_frozen_importlib", "_frozen_importlib_external"}


REINSTALL = (
    "reinstall it with a C++ compiler at hand "
    "(pip install --force-reinstall --no-cache-dir --no-build-isolation)"
)
"""How to rebuild the extension, without a cached wheel and with the installed torch."""


def _load_extension() -> bool:
    """Loads the C++ extension, which implements the CPU operators; returns whether it exists.

    Warns if the extension does not exist.

    Raises:
        ImportError: the extension exists but cannot be loaded.
    """
    name = f"{_PACKAGE}._C"
    spec = importlib.util.find_spec(name)
    if spec is None:
        slower = "every input on a CPU takes the slower path through ATen operators"
        if (source := Path(__file__).parents[2]).joinpath("csrc").is_dir():
            state = f"is imported from its sources in {source}, where no C++ extension was built"
            remedy = (
                "run Python in another folder if the package is installed, or build in place "
                "(pip install --no-build-isolation --editable .)"
            )
        else:
            state, remedy = "was built without its C++ extension", REINSTALL
        _warn_importer(f"namernn_fast {state}: {slower}. To get the kernels, {remedy}.")
        return False
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"namernn_fast: the C++ extension {spec.origin} cannot be loaded with torch "
            f"{torch.__version__} and Python {platform.python_version()} on "
            f"{platform.system()} {platform.machine()}: {error}. It was built for another system "
            f"or another torch, or its file is damaged: {REINSTALL}",
            name=name,
            path=spec.origin,
        ) from error
    return True


def _warn_importer(message: str) -> None:
    """Issues a warning at the line of the caller's code that imported this package.

    A constant `stacklevel` of `warnings.warn` cannot find that line, because the number of frames
    in between depends on the import statement.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _IMPORTING:
        if frame.f_back is None:
            break
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


HAS_EXTENSION = _load_extension()
"""Whether the C++ extension is installed. Tests set it to False."""


class GpuNeeds(Protocol):
    """What the choice of a path on a GPU depends on. `call.Call` has it."""

    @property
    def projects(self) -> bool:
        """Whether the layers have proj_size."""

    @property
    def beyond_torch(self) -> bool:
        """Whether torch's own operators cannot run the call, or would wait for the device."""


def why_not_kernel(input: Tensor, cell: Cell = VANILLA, call: GpuNeeds | None = None) -> str | None:
    """Returns why no fused kernel can run a call on `input`, or None if one can.

    Args:
        input: a tensor with the dtype and the device of the call.
        cell: the cell.
        call: the call; None for a dense call without options.
    """
    if input.is_cpu and HAS_EXTENSION and input.dtype in CPU_DTYPES:  # fast path for the usual call
        return None
    if not input.is_cuda:
        return why_not_cpu_kernel(input)
    return why_not_gpu_kernel(cell, input.dtype, call) or why_not_triton(input.device)


_gpu_path: Literal["kernel", "torch"] | None = None


@contextlib.contextmanager
def gpu_path(path: Literal["kernel", "torch"]) -> Iterator[None]:
    """Context manager that runs GRU and LSTM on GPUs as asked for, wherever both ways are possible.

    For benchmarks. The setting is global to the process.

    Args:
        path: `kernel` for the Triton kernel, `torch` for torch's own layer.
    """
    global _gpu_path
    previous, _gpu_path = _gpu_path, path
    try:
        yield
    finally:
        _gpu_path = previous


def why_not_gpu_kernel(
    cell: Cell, dtype: torch.dtype = torch.float32, call: GpuNeeds | None = None
) -> str | None:
    """Returns why the GPU kernels do not run a call of a cell, or None if they do.

    This is the one place that chooses. Calls that torch's own GRU or LSTM can run go there, because
    cuDNN runs them; a measurement may change that.
    """
    if cell.program is None and cell.equation is None:
        return f"the {cell.name} cell has no program"
    if dtype not in TRITON_DTYPES:
        return f"the GPU kernels take 16- and 32-bit floating-point types, not {dtype}"
    if call is not None and call.projects:
        return "the GPU kernels do not support proj_size"
    has_operator = cell.torch is not None and cell.torch.operator is not None
    if has_operator and not (call is not None and call.beyond_torch) and _gpu_path != "kernel":
        return f"torch's own {cell.name.upper()} operator runs on a GPU, with cuDNN or MIOpen"
    return None


def why_not_cpu_kernel(input: Tensor) -> str | None:
    """Returns why the CPU kernel cannot run a call on `input`, or None if it can."""
    if not input.is_cpu:
        return f"the CPU kernel does not run on {input.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension was not built"
    if input.dtype not in CPU_DTYPES:
        return f"the CPU kernel takes 16- to 64-bit floating-point types, not {input.dtype}"
    return None


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Returns why Triton's kernels cannot run on a GPU, or None if they can.

    Triton may be missing or older than `TRITON_MINIMUM`, or the compute capability of an NVIDIA GPU
    may be below `CAPABILITY_MINIMUM`.
    """
    wanted = ".".join(map(str, TRITON_MINIMUM))
    try:
        import triton
    except ImportError as error:
        return (
            f"a {device.type} device needs Triton, which cannot be imported ({error}): "
            f"pip install 'triton>={wanted}'"
        )
    found = triton.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON_MINIMUM:
        return (
            f"a {device.type} device needs Triton {wanted} or newer, found {found}: "
            f"pip install --upgrade 'triton>={wanted}'"
        )
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY_MINIMUM:
            return (
                "the GPU kernels need compute capability "
                f"{CAPABILITY_MINIMUM[0]}.{CAPABILITY_MINIMUM[1]} or newer, {device} has "
                f"{capability[0]}.{capability[1]}"
            )
    return None
