"""`python -m namernn_fast`: prints versions, the processor's capability and the paths available."""

import platform

import torch

from . import __version__, availability, ops


def main() -> None:
    """Prints one line for each fact."""
    has_kernel = availability.HAS_EXTENSION
    kernel = f"cpu {ops.cpu_kernel()}" if has_kernel else "none (built without a compiler)"
    lines = {
        "namernn_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "CPU capability (ATen)": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "fused kernel": kernel,
        "fused kernel on GPUs": _triton(),
        "other devices and dtypes": "reference (ATen operators)",
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def _triton() -> str:
    """Returns Triton's version, or that there is none."""
    try:
        import triton
    except ImportError:
        return "none (Triton is not installed)"
    return f"triton {triton.__version__}"


if __name__ == "__main__":
    main()
