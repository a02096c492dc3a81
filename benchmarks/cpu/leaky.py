"""Times training with leaky layers: `python -m benchmarks.cpu.leaky [--record]`.

The rival is the recurrent layer of nn4n, a PyTorch package of leaky networks. Its loop over steps
is typical of research code. Tables show nn4n's time at its faster thread count.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import columns
from benchmarks.harness.columns import BATCH, Row
from benchmarks.harness.grid import TRAINING, Workload
from benchmarks.harness.study import Calls, Document, Study, grid
from namernn_fast import FusedLeakyRNN
from namernn_fast.testing import assert_within_budget

INPUT_SIZE, HIDDEN_SIZE = 10, 100
SHAPES = [(INPUT_SIZE, HIDDEN_SIZE, steps, batch) for steps in (100, 255) for batch in (16, 64)]
RIVAL, FUSED, WITH_NOISE = "nn4n", "FusedLeakyRNN", "with noise"
BEST = "nn4n at its best"


@dataclass(frozen=True)
class Leaky(Workload):
    """A leaky layer with a nonlinearity."""

    nonlinearity: str = "tanh"


def layers(nonlinearity: str) -> tuple[nn.Module, FusedLeakyRNN]:
    """Returns the recurrent layer of nn4n and the fused layer, with equal parameters."""
    from nn4n.model import CTRNN

    rival = CTRNN(dims=[INPUT_SIZE, HIDDEN_SIZE, 1], activation=nonlinearity).recurrent_layer
    fused = FusedLeakyRNN(
        INPUT_SIZE, HIDDEN_SIZE, nonlinearity=nonlinearity, rate=float(rival.alpha)
    )
    with torch.no_grad():
        for part, name in ((rival.input_layer, "ih"), (rival.hidden_layer, "hh")):
            getattr(fused, f"weight_{name}_l0").copy_(part.weight)
            getattr(fused, f"bias_{name}_l0").copy_(part.bias)
            part.bias.requires_grad_()  # like the biases of the fused layer
    return rival, fused


def equation(layer: FusedLeakyRNN, x: Tensor) -> Tensor:
    """Returns the output of a leaky layer, computed step by step in ATen operators."""
    act, a = getattr(torch, layer.nonlinearity), layer.rate_l0.sigmoid()
    r = v = x.new_zeros(x.shape[1], HIDDEN_SIZE)
    outputs = []
    for x_t in x:
        z = x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
        v = (1 - a) * v + a * (z + r @ layer.weight_hh_l0.T)
        r = act(v)
        outputs.append(r)
    return torch.stack(outputs)


def step(layer: nn.Module, run: Callable[[Tensor], Any], x: Tensor, gradient: Tensor) -> Any:
    """Runs a training step and returns the output."""
    for parameter in layer.parameters():
        parameter.grad = None
    returned = run(x)
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    output.backward(gradient)
    return output


def results(
    layer: nn.Module, run: Callable[[Tensor], Any], x: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Returns the output of a training step and the gradients of the weights."""
    output = step(layer, run, x, gradient)
    parameters = [*layer.parameters()]
    if not isinstance(layer, FusedLeakyRNN):
        parts = layer.input_layer, layer.hidden_layer
        parameters = [getattr(part, name) for name in ("weight", "bias") for part in parts]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    grads = {name: p.grad for name, p in zip(names, parameters, strict=False)}
    return {"output": output.detach(), **grads}


def calls(case: Leaky) -> Calls:
    """Returns the calls of both layers, after an error check, and a call with noise."""
    torch.manual_seed(0)
    rival, fused = layers(case.nonlinearity)
    steps = case.seq_len or 0, case.batch
    x = torch.randn(*steps, INPUT_SIZE)
    gradient = torch.randn(*steps, HIDDEN_SIZE)
    noise = torch.randn(*steps, HIDDEN_SIZE) / 10
    precise = copy.deepcopy(fused).double()  # nn4n computes in float32 only
    exact = results(precise, partial(equation, precise), x.double(), gradient.double())
    theirs, ours = (results(layer, layer, x, gradient) for layer in (rival, fused))
    assert_within_budget(ours, theirs, exact)
    return {
        RIVAL: lambda: step(rival, rival, x, gradient),
        FUSED: lambda: step(fused, fused, x, gradient),
        WITH_NOISE: lambda: step(fused, lambda x: fused(x, noise=noise), x, gradient),
    }


def at_best(rows: list[Row]) -> list[Row]:
    """Returns rows that compare the layer with nn4n at its faster thread count."""
    case = itemgetter("nonlinearity", "seq_len", "batch")
    found = []
    for row in rows:
        best = min(other["medians"][RIVAL] for other in rows if case(other) == case(row))
        scale = best / row["medians"][RIVAL]
        spread = {name: [scale * end for end in ends] for name, ends in row["spread"].items()}
        found.append(row | {"medians": row["medians"] | {BEST: best}, "spread": spread})
    return found


class AtBest(Study):
    """A study that compares with the rival at its faster thread count."""

    def report(self, document: Document) -> str:
        return super().report(document | {"rows": at_best(document["rows"])})


COLUMNS = (
    columns.key("act", "nonlinearity"),
    columns.key("T", "seq_len"),
    BATCH,
    columns.time(RIVAL),
    columns.time(FUSED),
    columns.over(BEST, FUSED),
    columns.interval(RIVAL),
    columns.over(BEST, WITH_NOISE, WITH_NOISE),
    columns.over(RIVAL, FUSED, "on as many threads"),
)
STUDY = AtBest(
    name="leaky",
    description=__doc__,
    cases=[
        case
        for nonlinearity in ("relu", "tanh")
        for case in grid(SHAPES, ["leaky"], [TRAINING], Leaky, nonlinearity=nonlinearity)
    ],
    calls=calls,
    table=lambda rows: columns.table(rows, COLUMNS, beside=["threads"]),
    caption=lambda _: (
        f"float32, forward and backward, D = {INPUT_SIZE}, H = {HIDDEN_SIZE}. Speed-ups are over "
        "nn4n on the number of threads that is faster for it, except in the last column."
    ),
    by=(),
    ours=FUSED,
    one_thread_too=True,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
