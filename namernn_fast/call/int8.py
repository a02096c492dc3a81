"""Weights as 8-bit integers: `weight` is about `integers * scale[:, None]`.

The scale of a row is its largest magnitude divided by 127 and cut to 17 significant bits, so that
each product is exact in float32, and quantizing the products gives the same integers and scales.
csrc/kernel/int8_rows.h computes the same bits.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import ops
from ..machine import availability

LARGEST = 127
"""The largest integer. The range is symmetric."""
SMALLEST = 2.0**-100
"""A row whose numbers are all smaller becomes zeros."""
MIN_HIDDEN = {"amx_int8": 128, "avx512_vnni": 128, "avx_vnni": 256}
"""The hidden_size from which on layers are faster with 8-bit weights, by the instructions that
multiply them. Other instructions take longer for batches than those that multiply floats."""


def check_prepared_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError if `prepare()` does not take this dtype."""
    if dtype not in (None, torch.int8):
        raise ValueError(f"dtype must be None or torch.int8, got {dtype}: use layer.to({dtype})")


def why_not_faster(hidden_size: int, min_hidden: int | None = None) -> str | None:
    """Returns why a layer in float32 would not be faster with 8-bit weights, or None if it would.

    Args:
        hidden_size: the hidden_size of the layer.
        min_hidden: the smallest hidden_size to count as faster, or None for `MIN_HIDDEN`.
    """
    if min_hidden is None:
        if not availability.HAS_EXTENSION:
            return "the package was built without a compiler"
        min_hidden = MIN_HIDDEN.get(ops.cpu_kernel(torch.int8))
    if min_hidden is None:
        return "this processor has no instructions that would make them faster"
    if hidden_size < min_hidden:
        return f"they pay off from hidden_size {min_hidden}, not for {hidden_size}"
    return None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row of a weight.

    Args:
        weight: (rows, columns), float32.

    Returns:
        integers (rows, columns), int8 from -127 to 127, and scale (rows), float32. The scale of a
        row is NaN, and its integers are 0, if a number of the row is not finite.
    """
    rows, columns = weight.shape
    largest = weight.abs().amax(1) if columns else weight.new_zeros(rows)
    scale = (largest / LARGEST).view(torch.int32).bitwise_and(~0x7F).view(torch.float32)
    scale = scale.masked_fill(largest < SMALLEST, 0).masked_fill(~largest.isfinite(), torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    numbers = (weight * inverse[:, None]).round().nan_to_num(0, 0, 0)
    return numbers.masked_fill(~(scale > 0)[:, None], 0).to(torch.int8), scale


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Returns the weight that `quantize` rounded to: (rows, columns), float32."""
    return integers * scale[:, None]


def to_integers(named: dict[str, Tensor], names: Iterable[str]) -> None:
    """Replaces the weights with these names by `<name>_int8` and `<name>_scale`."""
    for name in names:
        named[f"{name}_int8"], named[f"{name}_scale"] = quantize(named.pop(name))


def to_weights(named: dict[str, Tensor]) -> None:
    """Undoes `to_integers`, wherever it finds both names."""
    for key in [*named]:
        name = key.removesuffix("_int8")
        if name != key and f"{name}_scale" in named:
            named[name] = dequantize(named.pop(key), named.pop(f"{name}_scale"))
