"""The precision of float32 products, read from torch's settings."""

from typing import Any

import torch

from .torch_private import _get_fp32_precision_getter, called_by_dynamo, recompile_unless

get = _get_fp32_precision_getter
"""Returns the precision of a backend and an operator, ten times faster than the properties of
`torch.backends`. Dynamo cannot trace it."""


@called_by_dynamo
def on_cpu(operator: str) -> str:
    """Returns the precision of float32 products that `torch.backends.mkldnn` sets for an operator.

    Args:
        operator: `matmul` or `rnn`.

    Returns:
        `bf16`, `tf32`, or any other string for full precision.
    """
    return get("mkldnn", operator)


@called_by_dynamo
def guard_on_cpu(operator: str) -> None:
    """While `torch.compile` traces, makes it recompile if `on_cpu(operator)` changes later."""
    expected = on_cpu(operator)
    code = f"torch.backends.mkldnn.{operator}.fp32_precision == {expected!r}"
    recompile_unless(lambda: on_cpu(operator) == expected, code)


def of_products() -> str:
    """Returns the precision of torch's own float32 matrix products on a GPU."""
    setting: Any = torch.backends.cuda.matmul
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
