"""`explain`: which path a layer takes for an input, and why it takes no other."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .dispatch import why_not_kernel
from .functional import cast_like_autocast
from .nn import FusedRNN, FusedRNNCell


class Explanation(NamedTuple):
    """What `explain` returns; `str()` makes a sentence of it."""

    path: str
    """`cpu` and an instruction set, `triton` and an architecture, `reference`, or `torch`."""
    why_not: dict[str, str]
    """For every path not taken, the reason."""

    def __str__(self) -> str:
        reasons = "; ".join(f"not {path}: {reason}" for path, reason in self.why_not.items())
        return f"{self.path} ({reasons})" if reasons else self.path


def explain(
    layer: torch.nn.Module, input: Tensor | PackedSequence, hx: Tensor | None = None
) -> Explanation:
    """Says which path `layer(input)` takes and why it takes no other. Nothing is computed.

    It answers for the current settings: gradients on or off, autocast, torch.func transforms.

    Paths: `cpu avx512`, `cpu avx2` and `cpu baseline` are the fused CPU kernel in the best
    instruction set of this processor, `cpu amx` and `cpu avx512_bf16` the fused CPU kernel with
    products in bfloat16; `triton sm_90`, for example, is the fused kernel of a GPU; `reference` is
    ATen operators, step by step; `torch` is torch's own operator for a single step, which a
    FusedRNNCell takes where that is faster.

    Args:
        layer: a FusedRNN or FusedRNNCell.
        input, hx: of the call in question. Only a FusedRNNCell asks about hx.

    Raises:
        TypeError: layer or input is something else.
        RuntimeError: the input is on a GPU, and Triton is missing or too old, or the GPU is.
    """
    if not isinstance(layer, FusedRNN | FusedRNNCell):
        raise TypeError(f"layer must be a FusedRNN or FusedRNNCell, got {type(layer).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if not isinstance(data, Tensor):
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    device = "triton" if data.is_cuda else "cpu"
    if isinstance(layer, FusedRNNCell):
        reason = layer.why_not_fused(data, hx)
        if reason is not None:
            return Explanation("torch", {device: reason})
    if torch._C._is_any_autocast_enabled():
        data = cast_like_autocast(data)
    reason = why_not_kernel(data, torch.compiler.is_compiling())
    if reason is not None:
        return Explanation("reference", {device: reason})
    if data.is_cuda:
        kernel, better = ops.gpu_backend(data.device).device_of(data).arch, "runs here"
    else:
        kernel, better = ops.cpu_kernel(data.dtype), "is faster"
    return Explanation(f"{device} {kernel}", {"reference": f"the fused kernel {better}"})
