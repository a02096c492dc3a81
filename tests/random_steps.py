"""Random equations: a strategy that draws the step functions of cells."""

import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch import sigmoid, tanh

from namernn_fast.equations.compiling import compile_step

UNARY = [
    tanh,
    sigmoid,
    torch.relu,
    F.softplus,
    torch.abs,
    torch.neg,
    torch.sign,
    lambda a: torch.exp(a.clamp(max=1)),
    lambda a: torch.log1p(a * a),
    lambda a: torch.sqrt(a * a + 1),
    lambda a: a - a.mean(-1, keepdim=True),
    lambda a: a.mean(-1, keepdim=True) + 0.0,
    lambda a: F.layer_norm(a.expand(a.shape), a.shape[-1:], eps=0.1) if a.shape[-1] > 1 else a,
    lambda a: a.detach(),
    lambda a: 1 - a,
    lambda a: a * 0.5,
]
BINARY = [
    torch.add,
    torch.sub,
    lambda a, b: a * tanh(b),
    lambda a, b: a / (b * b + 1),
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(a < b, a, 0.25),
    lambda a, b: torch.where((a <= b) & ~(a == 0), b, -a),
]


@strategies.composite
def steps(draw):
    """Draws a step of two gates and two states with up to 30 operations."""
    operations = [
        (draw(strategies.sampled_from([*UNARY, *BINARY])), draw(index), draw(index))
        for index in [strategies.integers(0, 40)]
        for _ in range(draw(strategies.integers(1, 30)))
    ]
    first, second = draw(strategies.integers(0, 40)), draw(strategies.integers(0, 40))

    def step(x, u, h, c, w, bias, drive, gain):
        values = [*x, *u, h, c, w, *bias, drive, gain]
        for operation, i, j in operations:
            chosen = values[-1 - i % len(values)], values[j % len(values)]
            values.append(operation(*(chosen[:1] if operation in UNARY else chosen)))
        return tuple(
            (values[-1 - i % len(operations)] + extra).expand(h.shape)
            for i, extra in ((first, h * 0), (second, 0.0 * c))
        )

    return step


def compiled_or_none(step):
    """Returns the program of a drawn step, or None if it would keep too many values."""
    options = {"own": {"w": 1, "bias": 2}, "inputs": {"drive": False, "gain": True}}
    try:
        return compile_step(step, name="random", gates=2, states=2, heads=True, **options)
    except ValueError as error:
        if "kept values" not in str(error):
            raise
        return None
