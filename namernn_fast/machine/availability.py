"""Reports whether the C++ extension, Triton and the GPU can be used, and why not."""

import importlib
import importlib.util
import platform
import sys
import warnings
from pathlib import Path

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


def why_not_kernel(input: Tensor, cell: Cell = VANILLA, has_reset_to: bool = False) -> str | None:
    """Returns why no fused kernel can run a call on `input`, or None if one can."""
    if input.is_cpu and HAS_EXTENSION and input.dtype in CPU_DTYPES:  # fast path for the usual call
        return None
    if not input.is_cuda:
        return why_not_cpu_kernel(input)
    why_not = why_not_gpu_kernel(cell, has_reset_to)
    if why_not is None and input.dtype not in TRITON_DTYPES:
        return f"the GPU kernels take 16- and 32-bit floating-point types, not {input.dtype}"
    return why_not


def why_not_gpu_kernel(cell: Cell, has_reset_to: bool = False) -> str | None:
    """Returns why no GPU kernel can run a call of a cell, or None if one can."""
    if cell.has_gpu_kernel:
        return "the GPU kernels do not support reset_to" if has_reset_to else None
    if cell.torch is None:
        return f"the {cell.name} cell has no GPU kernel"
    return f"torch's own {cell.name.upper()} operator runs on a GPU, with cuDNN or MIOpen"


def why_not_cpu_kernel(input: Tensor) -> str | None:
    """Returns why the CPU kernel cannot run a call on `input`, or None if it can."""
    if not input.is_cpu:
        return f"the CPU kernel does not run on {input.device.type}"
    if not HAS_EXTENSION:
        return "the C++ extension was not built"
    if input.dtype not in CPU_DTYPES:
        return f"the CPU kernel takes 16- to 64-bit floating-point types, not {input.dtype}"
    return None


def require_triton(device: torch.device) -> None:
    """Checks that the Triton kernels can run on a GPU.

    Raises:
        RuntimeError: Triton is missing or older than `TRITON_MINIMUM`, or an NVIDIA GPU has a
            compute capability below `CAPABILITY_MINIMUM`.
    """
    wanted = ".".join(map(str, TRITON_MINIMUM))
    or_move = f"or move the layer and its input from {device} to the CPU"
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            f"namernn_fast: a {device.type} device needs Triton, which cannot be imported "
            f"({error}): pip install 'triton>={wanted}', {or_move}"
        ) from error
    found = triton.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < TRITON_MINIMUM:
        raise RuntimeError(
            f"namernn_fast: a {device.type} device needs Triton {wanted} or newer, found {found}: "
            f"pip install --upgrade 'triton>={wanted}', {or_move}"
        )
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY_MINIMUM:
            raise RuntimeError(
                "namernn_fast: the GPU kernels need compute capability "
                f"{CAPABILITY_MINIMUM[0]}.{CAPABILITY_MINIMUM[1]} or newer, {device} has "
                f"{capability[0]}.{capability[1]}: use torch.nn.RNN there, {or_move}"
            )
