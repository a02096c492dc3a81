"""Weights as 8-bit integers: `weight` is approximated by `integers * scale[:, None]`.

The scale of a row is its largest magnitude divided by 127, truncated to 17 significant bits. So
`integer * scale` is exact in float32, and quantizing these products gives the same integers and
scales. csrc/kernel/products/int8_rows.h computes bit-identical integers and scales.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import ops

LARGEST = 127
"""The largest quantized integer. The smallest is -127."""
SMALLEST_SCALE = 2.0**-107
"""Rows with a smaller scale are quantized to zeros."""
MOST_INPUTS = (2**31 - 1) // (255 * 127)
"""The maximum number of columns of a weight. Sums of more products could overflow 32 bits."""
MIN_HIDDEN = {"amx_int8": 128, "avx512_vnni": 128, "avx_vnni": 256, "avx2": 256}
"""The smallest hidden_size for which layers are faster with 8-bit weights, for each instruction set
of 8-bit kernels. With other instruction sets, floats may be faster."""


def check_prepared_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError if `prepare()` does not support this dtype."""
    if dtype not in (None, torch.int8):
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        hint = f": use layer.to({dtype})" if is_float else ""
        raise ValueError(f"dtype must be None or torch.int8, got {dtype!r}{hint}")


def check_weights(weights: Iterable[Tensor]) -> None:
    """Raises ValueError if weights cannot be rounded to 8 bits."""
    for weight in weights:
        if weight.dtype != torch.float32:
            raise ValueError(f"8-bit weights need a layer in float32, got {weight.dtype}")
        if weight.shape[1:] > (MOST_INPUTS,):
            raise ValueError(
                f"8-bit weights take at most {MOST_INPUTS} inputs, got {weight.shape[1]}"
            )


def default_min_hidden() -> int | None:
    """Returns the `MIN_HIDDEN` of this processor, or None if floats may always be faster.

    Requires the C++ extension.
    """
    kernel, float_kernel = ops.cpu_kernel(torch.int8), ops.cpu_kernel(torch.float32)
    # With AVX-512 but without VNNI, products of floats are faster than AVX2's products of integers.
    return None if kernel == "avx2" != float_kernel else MIN_HIDDEN.get(kernel)


def why_not_faster(hidden_size: int, min_hidden: int | None = None) -> str | None:
    """Returns why a layer in float32 would not be faster with 8-bit weights, or None if it would.

    Requires the C++ extension.

    Args:
        hidden_size: the hidden_size of the layer.
        min_hidden: the smallest hidden_size that counts as faster; None for the default.
    """
    if min_hidden is None:
        min_hidden = default_min_hidden()
    if min_hidden is None:
        return "this processor has no instructions that would make them faster"
    if hidden_size < min_hidden:
        return f"they pay off if hidden_size is at least {min_hidden}, not {hidden_size}"
    return None


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes each row of a weight.

    Args:
        weight: (rows, columns), float32.

    Returns:
        integers (rows, columns), int8 from -127 to 127, and scale (rows), float32. If a row has any
        non-finite number, its scale is NaN and its integers are 0.
    """
    rows, columns = weight.shape
    largest = weight.abs().amax(1) if columns else weight.new_zeros(rows)
    scale = (largest / LARGEST).view(torch.int32).bitwise_and(~0x7F).view(torch.float32)
    scale = scale.masked_fill(scale < SMALLEST_SCALE, 0)
    scale = scale.masked_fill(~largest.isfinite(), torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    numbers = (weight * inverse[:, None]).round().nan_to_num(0, 0, 0)
    return numbers.masked_fill(~(scale > 0)[:, None], 0).to(torch.int8), scale


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Returns the rounded weight that `quantize` encoded: (rows, columns), float32."""
    return integers * scale[:, None]


def to_integers(named: dict[str, Tensor], names: Iterable[str]) -> None:
    """Replaces each named weight with `<name>_int8` and `<name>_scale`."""
    for name in names:
        named[f"{name}_int8"], named[f"{name}_scale"] = quantize(named.pop(name))


def to_weights(named: dict[str, Tensor], names: Iterable[str]) -> list[str]:
    """Undoes `to_integers` for each of `names` that is quantized in `named`.

    Returns:
        An error message for each weight that lacks integers or scales, or has invalid ones.
    """
    errors = []
    for name in names:
        keys = f"{name}_int8", f"{name}_scale"
        integers, scale = (named.pop(key, None) for key in keys)
        if integers is None and scale is None:
            continue
        if integers is None or scale is None:
            missing, other = keys if integers is None else keys[::-1]
            errors.append(f"{missing} is missing, but {other} needs it")
        elif integers.dtype != torch.int8 or scale.shape != integers.shape[:1]:
            shapes = f"{list(integers.shape)} in {integers.dtype} and {list(scale.shape)}"
            errors.append(f"{keys[0]} must be int8 with a {keys[1]} for each row, got {shapes}")
        else:
            named[name] = dequantize(integers, scale.float())
    return errors
