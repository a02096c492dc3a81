"""The precision of float32 products on a CPU."""

import contextlib
from collections.abc import Iterator

import torch

SETTINGS = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
"""The values of torch's settings, by the names of `torch.set_float32_matmul_precision`."""


@contextlib.contextmanager
def precision_of_products(name: str) -> Iterator[None]:
    """Sets the precision of float32 products on a CPU, for all layers, within a block."""
    settings = torch.backends.mkldnn.matmul, torch.backends.mkldnn.rnn
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = SETTINGS[name]
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
