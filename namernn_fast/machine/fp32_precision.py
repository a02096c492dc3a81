"""The precision of float32 products on GPUs, `ieee` or `tf32`, read from torch's settings."""

from typing import Any

import torch


def of_rnns() -> str:
    """Returns the precision of all products of an RNN, which is always `ieee` on AMD GPUs."""
    return "ieee" if torch.version.hip else _of(torch.backends.cudnn.rnn)


def of_products() -> str:
    """Returns the precision of torch's own matrix products."""
    return _of(torch.backends.cuda.matmul)


def _of(setting: Any) -> str:
    return "tf32" if setting.fp32_precision == "tf32" else "ieee"
