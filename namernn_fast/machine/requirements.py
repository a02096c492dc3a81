"""Imports torch and checks its version before any other module of this package is imported."""

import re
import warnings

with warnings.catch_warnings():
    # Importing torch warns if NumPy is missing, which this package does not need.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch

TORCH_MINIMUM = (2, 10)


def check_torch(found: str) -> None:
    """Checks the version of torch.

    Args:
        found: the version. A version that does not start with two numbers is accepted.

    Raises:
        ImportError: the version is below `TORCH_MINIMUM`.
    """
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and (int(numbers[1]), int(numbers[2])) < TORCH_MINIMUM:
        wanted = ".".join(map(str, TORCH_MINIMUM))
        raise ImportError(
            f"namernn_fast needs torch {wanted} or newer, found {found}: "
            f"pip install --upgrade 'torch>={wanted}'"
        )


check_torch(torch.__version__)
