"""Tests that calls free the memory that they allocate."""

import ctypes
import gc
import os

import pytest
import torch
from kinds import needs_extension

from namernn_fast import FusedLayerNormGRU, FusedLSTM

pytestmark = needs_extension
LIBC = ctypes.CDLL(None) if os.name == "posix" else None


class _Allocated(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocated_bytes():
    function = LIBC.mallinfo2
    function.restype = _Allocated
    return function().uordblks


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("kind", [FusedLSTM, FusedLayerNormGRU])
@pytest.mark.parametrize("what", ["train", "prepare", "stream"])
def test_calls_free_what_they_allocate(kind, what):
    layer, x = kind(8, 8), torch.randn(2, 2, 8)
    stream = layer.prepare().stream(2)

    def train():
        layer.zero_grad()
        layer(x)[0].sum().backward()

    call = {"train": train, "prepare": layer.prepare, "stream": lambda: stream(x)}[what]
    calls = 500
    grown = []
    for _ in range(3):
        gc.collect()
        before = _allocated_bytes()
        for _ in range(calls):
            call()
        gc.collect()
        grown.append(_allocated_bytes() - before)
    # Other threads and caches may allocate now and then. A leak grows in every repetition.
    assert min(grown) < 16 * calls, grown
