"""Tells plain tensors from those whose values only torch's dispatcher can read.

The operators take states in an optional list, `Tensor[]?`, which the dispatcher does not look into.
So a wrapper subclass (the result of a functional `all_reduce`, for example), a lazily negated
tensor or a ZeroTensor would reach the kernels as it is, and kernels read memory.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..machine.torch_private import DispatchKey, _dispatch_keys

_PLAIN = (Tensor, torch.nn.Parameter)


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all tensors hold their values in memory, and have a class known to do so."""
    for tensor in tensors:  # a loop, because small calls would notice a generator
        if type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor():
            return False
    return True


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether the class of a tensor handles operators by `__torch_dispatch__`."""
    return _dispatch_keys(tensor).has(DispatchKey.Python)  # type: ignore[no-any-return]


def resolved(tensor: Tensor) -> Tensor:
    """Returns a tensor, or a copy if its values are not in its memory.

    The copy is plain except for some wrapper subclasses, which copy to their own class.
    """
    not_in_memory = DispatchKey.Python, DispatchKey.Negative, DispatchKey.ZeroTensor
    return tensor.clone() if any(map(_dispatch_keys(tensor).has, not_in_memory)) else tensor
