"""Copies tensors in a forked process, where torch's own operators may hang.

A forked child has only the thread that called fork. If the parent used torch's thread pool, any
torch operator that splits its work among threads waits forever in the child. Operators on few
elements run on the calling thread alone, so these functions copy a few elements at a time.
In a process that was not forked, these functions call torch's own operators once.
"""

import os

import torch
from torch import Tensor

from .context import is_compiling

MOST_ELEMENTS = 2**15 - 1
"""The maximum number of elements per copy: one less than `at::internal::GRAIN_SIZE`."""

_forked = False


def _remember() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember)


def is_forked() -> bool:
    """Returns whether this process was forked. False while a compiler traces a call."""
    return _forked and not is_compiling()


def copy_(target: Tensor, source: Tensor) -> Tensor:
    """Returns `target.copy_(source)`."""
    if not is_forked() or target.numel() <= MOST_ELEMENTS:
        return target.copy_(source)
    source = source.expand_as(target)
    dim = max(range(target.dim()), key=target.size)
    half, size = target.shape[dim] // 2, target.shape[dim]
    for start, length in ((0, half), (half, size - half)):
        copy_(target.narrow(dim, start, length), source.narrow(dim, start, length))
    return target


def zero_(target: Tensor) -> Tensor:
    """Returns `target.zero_()`."""
    return copy_(target, target.new_zeros(())) if is_forked() else target.zero_()


def clone(tensor: Tensor) -> Tensor:
    """Returns `tensor.clone()`."""
    return copy_(torch.empty_like(tensor), tensor) if is_forked() else tensor.clone()
