"""Launching kernels: the one place where this package calls Triton to run something."""

from typing import Any


def run(kernel, grid: tuple[int, ...], arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    """Launches a kernel.

    Args:
        kernel: a function that Triton compiles.
        grid: the number of programs in each of up to three dimensions.
        arguments: by name, the kernel's arguments, and those for which it is compiled.
        settings: by name, how Triton is to compile and launch the kernel.
    """
    kernel[grid](**arguments, **settings)
