"""Matrix products in the precision of the recurrence.

In cuDNN, `torch.backends.cudnn.rnn.fp32_precision` sets the precision of all float32 products of
an RNN. Torch's own matrix products use another setting,
`torch.backends.cuda.matmul.fp32_precision`. Both settings are global, so a call cannot change them
temporarily: other threads would see the change. So if the two settings differ, a kernel of this
package computes float32 products. Torch computes all other products.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..machine import fp32_precision
from . import launching
from .device import Device, device_of, may_round_to_tf32
from .kernels import product_kernel

_TERMS_OF_A_PART = 512  # Minimum number of terms per part when programs split a sum.


class Tiles(NamedTuple):
    """The tile of a product that each program computes."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int = 3


# Tiles of these sizes do not spill registers on any device, whatever the strides.
_SMALL = {"ieee": Tiles(64, 64, 16, warps=8), "tf32": Tiles(64, 64, 32, warps=4)}
_LARGE = {"ieee": _SMALL["ieee"], "tf32": Tiles(128, 64, 32, warps=8)}


class ProductPlan(NamedTuple):
    """The tiles, the split and the precision of a product."""

    tiles: Tiles
    terms: int
    """Number of terms of the sum in each part, a multiple of `tiles.block_k`."""
    parts: int
    """Number of parts that the sum is split into. The parts are added in order."""
    precision: str
    """`ieee` or `tf32`."""

    def constants(self) -> dict[str, Any]:
        """Returns the compile-time arguments of the kernel."""
        names = ("block_m", "block_n", "block_k", "stages")
        sizes = {name.upper(): getattr(self.tiles, name) for name in names}
        return sizes | {"PRECISION": self.precision}

    def settings(self, device: Device) -> dict[str, Any]:
        """Returns Triton's compile and launch options for the kernel."""
        settings = {"num_warps": self.tiles.warps, "enable_fp_fusion": True}
        if device.backend == "cuda":
            # Without a limit, the compiler may spill registers to fit more programs on an SM.
            settings["maxnreg"] = device.most_registers(self.tiles.warps)
        return settings


def choose(M: int, N: int, K: int, precision: str, processors: int) -> ProductPlan:
    """Returns the plan for the product of an (M, K) and a (K, N) matrix with any strides.

    `precision` is `ieee` or `tf32`; `processors` is the number of the GPU's SMs.
    """

    def blocks(tiles: Tiles) -> int:
        return -(-M // tiles.block_m) * -(-N // tiles.block_n)

    tiles = _LARGE[precision] if blocks(_LARGE[precision]) >= processors else _SMALL[precision]
    parts = max(1, min(K // _TERMS_OF_A_PART, processors // max(1, blocks(tiles))))
    terms = triton.cdiv(triton.cdiv(K, parts), tiles.block_k) * tiles.block_k
    return ProductPlan(tiles, terms, max(1, triton.cdiv(K, max(1, terms))), precision)


def precision_of_its_own(like: Tensor) -> str | None:
    """Returns the precision of an RNN's products, or None if torch's other products use it too.

    In 16 bits the two precisions never differ. `like` is a tensor with the device and
    dtype of the products.
    """
    if like.dtype != torch.float32:
        return None
    precision = "tf32" if may_round_to_tf32(device_of(like)) else "ieee"
    return precision if precision != fp32_precision.of_products() else None


def product(
    left: Tensor, right: Tensor, plus: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Returns left @ right + plus. Float32 products have the precision of an RNN's products.

    Repeated calls are bit-identical.

    Args:
        left: matrix (M, K) with any strides.
        right: matrix (K, N) with any strides.
        plus: tensor to add, (N), (M, 1) or (M, N), or None for zeros.
        out: receives the result, (M, N), contiguous; may be the same tensor as `plus`. If None, a
            new tensor is allocated.
    """
    if (precision := precision_of_its_own(left)) is not None:
        return _product(left, right, plus, out, precision)
    if plus is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(plus, left, right, out=out)


def _product(
    left: Tensor, right: Tensor, plus: Tensor | None, out: Tensor | None, precision: str
) -> Tensor:
    """Implements `product` with `product_kernel`."""
    (M, K), N, device = left.shape, right.shape[1], device_of(left)
    if out is None:
        out = left.new_empty(M, N)
    if M == 0 or N == 0:
        return out
    plan = choose(M, N, K, precision, device.processors)
    split = plan.parts > 1
    sums = left.new_empty(plan.parts, M, N) if split else out
    added = None if split or plus is None else plus.expand(M, N)
    arguments: dict[str, Any] = {"left": left, "right": right, "plus": added, "out": sums}
    arguments |= {"M": M, "N": N, "K": K, "K_OF_A_PART": plan.terms}
    for matrix, dimensions in (("left", "mk"), ("right", "kn"), ("plus", "mn")):
        strides = (0, 0) if arguments[matrix] is None else arguments[matrix].stride()
        for dimension, stride in zip(dimensions, strides, strict=True):
            arguments[f"{matrix}_stride_{dimension}"] = stride
    farthest = max(plan.tiles[:3]) * 2 * max(*left.stride(), *right.stride())
    arguments |= {**plan.constants(), "WIDE": farthest >= 2**31}
    blocks = triton.cdiv(M, plan.tiles.block_m) * triton.cdiv(N, plan.tiles.block_n)
    launching.run(product_kernel, (blocks, plan.parts), arguments, plan.settings(device))
    if split:
        torch.sum(sums, 0, out=out) if plus is None else torch.add(sums.sum(0), plus, out=out)
    return out
