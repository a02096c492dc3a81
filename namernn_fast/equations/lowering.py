"""How ATen operations are computed by the operations of programs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def _power(e: Any, x: Any, exponent: float) -> Any:
    """Computes a power from products of x or of its square root."""
    factor, count = (x, abs(exponent)) if exponent % 1 == 0 else (e("sqrt", x), abs(2 * exponent))
    if count % 1 or count > 8:
        raise NotImplementedError("powers other than by small multiples of 0.5")
    product = factor if count else 1.0
    for _ in range(int(count) - 1):
        product = e("mul", product, factor)
    return product if exponent >= 0 else e("recip", product)


def _clamp(e: Any, x: Any, min: Any = None, max: Any = None) -> Any:
    x = x if min is None else e("max", x, min)
    return x if max is None else e("min", x, max)


SAME = "neg abs sign sqrt rsqrt exp log log1p expm1 tanh sigmoid mul div lt le eq where"
RENAMED = {
    **{"sgn": "sign", "reciprocal": "recip", "maximum": "max", "minimum": "min"},
    **{"logical_and": "mul", "bitwise_and": "mul", "logical_or": "max", "bitwise_or": "max"},
    **{"sigmoid_backward": "sigmoid_grad", "tanh_backward": "tanh_grad"},
}
POINTWISE: dict[str, Callable[..., Any]] = {
    **{name: lambda e, *x, op=op: e(op, *x) for name, op in RENAMED.items()},
    **{op: lambda e, *x, op=op: e(op, *x) for op in SAME.split()},
    "add": lambda e, a, b, alpha=1: e("add", a, e("mul", b, alpha)),
    "sub": lambda e, a, b, alpha=1: e("sub", a, e("mul", b, alpha)),
    "rsub": lambda e, a, b, alpha=1: e("sub", b, e("mul", a, alpha)),
    "addcmul": lambda e, a, b, c, value=1: e("add", a, e("mul", e("mul", b, value), c)),
    "addcdiv": lambda e, a, b, c, value=1: e("add", a, e("div", e("mul", b, value), c)),
    "lerp": lambda e, a, b, weight: e("add", a, e("mul", weight, e("sub", b, a))),
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda e, x, max: e("min", x, max),
    "gt": lambda e, a, b: e("lt", b, a),
    "ge": lambda e, a, b: e("le", b, a),
    "ne": lambda e, a, b: e("sub", 1, e("eq", a, b)),
    "logical_not": lambda e, x: e("eq", x, 0),
    "bitwise_not": lambda e, x: e("eq", x, 0),
    "exp2": lambda e, x: e("exp", e("mul", x, math.log(2))),
    "log2": lambda e, x: e("mul", e("log", x), 1 / math.log(2)),
    "log10": lambda e, x: e("mul", e("log", x), 1 / math.log(10)),
    "masked_fill": lambda e, x, mask, value: e("where", mask, value, x),
    # A constant that comes first gets the gradient if both are equal (see `program`).
    "relu": lambda e, x: e("max", 0, x),
    "hardtanh": lambda e, x, low=-1, high=1: e("min", high, e("max", low, x)),
    "threshold": lambda e, x, bound, value: e("where", e("le", x, bound), value, x),
    "softplus": lambda e, x, beta=1, _=20: e("div", e("softplus", e("mul", x, beta)), beta),
    "softplus_backward": lambda e, g, x, beta, _: e("mul", g, e("sigmoid", e("mul", x, beta))),
    "fill": lambda e, x, value: value,
    "copy": lambda e, x, source: source,
    "_to_copy": lambda e, x: x,
}
"""How to compute operations on corresponding elements. Each function gets a function that makes an
operation of programs, and the arguments."""


def _variance(x: Tensor, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    variance = (centred * centred).mean(dim, keepdim=keepdim)
    count = math.prod(x.shape if dim is None else [x.shape[d] for d in dim])
    correction = 1 if correction is None else correction
    return variance * count / (count - correction) if correction else variance


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    if [*shape] != [*x.shape[-len(shape) :]]:
        raise NotImplementedError("normalize over h.shape[-1:], because a step knows no sizes")
    variance, mean = torch.var_mean(x, [*range(-len(shape), 0)], correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, scale


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, mean: Tensor, scale: Tensor, weight: Any, *_: Any
) -> tuple[Tensor, ...]:
    unit, g = (x - mean) * scale, grad if weight is None else grad * weight
    mean_g, slope = g.mean(-1, keepdim=True), (g * unit).mean(-1, keepdim=True)
    of_weight, of_bias = (grad * unit).sum_to_size(shape), grad.sum_to_size(shape)
    return (g - mean_g - unit * slope) * scale, of_weight, of_bias


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        raise NotImplementedError('use approximate="tanh"')
    inner = x + 0.044715 * (x * x * x)  # as in torch's gradient, so that they share values
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * inner))


def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    # The clamp keeps overflows, and so NaN gradients, out of the branch that is not taken.
    negative = torch.expm1(x.clamp(max=0) * input_scale) * (alpha * scale)
    return torch.where(x > 0, x * scale, negative)


DECOMPOSED: dict[str, Callable[..., Any]] = {
    "elu": _elu,
    "gelu": _gelu,
    "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "mish": lambda x: x * torch.tanh(softplus(x)),
    "leaky_relu": lambda x, slope=0.01: torch.where(x > 0, x, x * slope),
    "log_sigmoid_forward": lambda x: (-softplus(-x), x.new_zeros(())),
    "log_sigmoid_backward": lambda g, x, _: g * torch.sigmoid(-x),
    "logaddexp": lambda a, b: torch.maximum(a, b) + softplus(-torch.abs(a - b)),
    "var": _variance,
    "std": lambda *arguments, **options: _variance(*arguments, **options).sqrt(),
    "var_mean": lambda x, dim=None, correction=None, keepdim=False: (
        _variance(x, dim, correction, keepdim),
        x.mean(dim, keepdim=keepdim),
    ),
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
}
"""Operations in terms of others. For further operations torch has decompositions, but some of them
take longer, are less precise, or import sympy."""
