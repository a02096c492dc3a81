"""The precision of float32 products."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SETTINGS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
"""The values of torch's settings, by the names of `torch.set_float32_matmul_precision`."""


def precision_of_products(name: str) -> contextlib.AbstractContextManager[None]:
    """Sets the precision of float32 products on a CPU, for all layers, within a block."""
    return fp32_precision(SETTINGS[name], torch.backends.mkldnn.matmul, torch.backends.mkldnn.rnn)


@contextlib.contextmanager
def fp32_precision(precision: str, *settings: Any) -> Iterator[None]:
    """Sets `fp32_precision` of these `torch.backends` within a block."""
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = precision
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
