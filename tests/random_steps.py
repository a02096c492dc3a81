"""Random equations: a strategy that draws the step functions of cells."""

import re

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
def cells(draw):
    """Draws a step of up to 30 operations, and what its cell has, as options of `compile_step`."""
    size, place = strategies.integers(1, 4), strategies.integers(0, 40)
    options = {"gates": draw(size), "states": draw(size), "recurs": draw(strategies.booleans())}
    options["heads"] = options["recurs"]
    for option, choices in {
        "own": {"w": 1, "bias": options["gates"]},
        "inputs": {"drive": False, "gain": True},
    }.items():
        names = draw(strategies.sets(strategies.sampled_from([*choices])))
        options[option] = {name: choices[name] for name in sorted(names)}
    operations = [
        (draw(strategies.sampled_from([*UNARY, *BINARY])), draw(place), draw(place))
        for _ in range(draw(strategies.integers(1, 30)))
    ]
    results = [draw(place) for _ in range(options["states"])]

    def step(*arguments, **named):
        values = []
        for argument in (*arguments, *named.values()):
            values += argument if isinstance(argument, tuple) else [argument]
        h = arguments[1 + options["recurs"]]
        for operation, i, j in operations:
            chosen = values[-1 - i % len(values)], values[j % len(values)]
            values.append(operation(*(chosen[:1] if operation in UNARY else chosen)))
        states = [values[-1 - k % len(operations)] for k in results]
        return tuple((state + 0.0 * h).expand(h.shape) for state in states)

    return step, options


def compiled_or_none(step, options):
    """Returns the program of a drawn step, or None if it exceeds a limit of programs."""
    try:
        return compile_step(step, name="random", **options)
    except ValueError as error:
        if not re.search("number of kept values|registers", str(error)):
            raise
        return None
