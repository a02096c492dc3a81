"""Times training with leaky layers: `python -m benchmarks.cpu.leaky [--record]`.

The rival is the recurrent layer of nn4n, the package of leaky networks for PyTorch, whose loop over
steps is written like those of laboratories. It runs on as many threads as are faster for it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
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
            part.bias.requires_grad_()  # as the biases of the fused layer
    return rival, fused


class Equation(FusedLeakyRNN):
    """The equation in float64, step by step. (nn4n computes in float32 only.)"""

    @classmethod
    def of(cls, layer: FusedLeakyRNN) -> "Equation":
        """Returns a copy of a layer in this class."""
        copied = copy.deepcopy(layer).double()
        copied.__class__ = cls
        return copied  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """Returns the output, and nothing else."""
        act, a = getattr(torch, self.nonlinearity), self.rate_l0.sigmoid()
        r, v, outputs = x.new_zeros(()), x.new_zeros(()), []
        for x_t in x:
            z = x_t @ self.weight_ih_l0.T + self.bias_ih_l0 + self.bias_hh_l0
            z = z + r @ self.weight_hh_l0.T if r.dim() else z
            v = (1 - a) * v + a * z
            r = act(v)
            outputs.append(r)
        return torch.stack(outputs), None


def step(layer: nn.Module, run: Callable[[Tensor], Any], x: Tensor, gradient: Tensor) -> Any:
    """Runs a training step and returns the output."""
    for parameter in layer.parameters():
        parameter.grad = None
    returned = run(x)
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    output.backward(gradient)
    return output


def results(layer: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Returns the output of a training step and the gradients of the weights."""
    output = step(layer, layer, x, gradient)
    parameters = [*layer.parameters()]
    if not isinstance(layer, FusedLeakyRNN):
        parts = layer.input_layer, layer.hidden_layer
        parameters = [getattr(part, name) for name in ("weight", "bias") for part in parts]  # type: ignore[union-attr]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    grads = {name: p.grad for name, p in zip(names, parameters, strict=False)}
    return {"output": output.detach(), **grads}


def calls(case: Leaky) -> Calls:
    """Returns the calls of both layers, whose results meet the error budget, and with noise."""
    torch.manual_seed(0)
    rival, fused = layers(case.nonlinearity)
    steps = case.seq_len or 0, case.batch
    x = torch.randn(*steps, INPUT_SIZE)
    gradient = torch.randn(*steps, HIDDEN_SIZE)
    noise = torch.randn(*steps, HIDDEN_SIZE) / 10
    exact = results(Equation.of(fused), x.double(), gradient.double())
    assert_within_budget(results(fused, x, gradient), results(rival, x, gradient), exact)
    return {
        RIVAL: lambda: step(rival, rival, x, gradient),
        FUSED: lambda: step(fused, fused, x, gradient),
        WITH_NOISE: lambda: step(fused, lambda x: fused(x, noise=noise), x, gradient),
    }


def at_best(rows: list[Row]) -> list[Row]:
    """Returns rows that compare with the time of nn4n on the number of threads it is faster on."""
    best: dict[tuple[Any, ...], float] = {}
    cases = [tuple(row[name] for name in ("nonlinearity", "seq_len", "batch")) for row in rows]
    for row, case in zip(rows, cases, strict=True):
        best[case] = min(row["medians"][RIVAL], best.get(case, float("inf")))
    found = []
    for row, case in zip(rows, cases, strict=True):
        scale = best[case] / row["medians"][RIVAL]
        spread = {name: [scale * end for end in ends] for name, ends in row["spread"].items()}
        medians = row["medians"] | {BEST: best[case]}
        found.append(row | {"medians": medians, "spread": spread})
    return found


class AtBest(Study):
    """A study whose speed-ups are over the better of two numbers of threads."""

    def report(self, document: Document) -> str:
        """Returns the caption and the tables of a run."""
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
    table=lambda rows: columns.table(rows, COLUMNS),
    caption=lambda _: (
        f"float32, forward and backward, D = {INPUT_SIZE}, H = {HIDDEN_SIZE}. Speed-ups are over "
        "nn4n on the number of threads that is faster for it, except in the last column."
    ),
    by=("threads",),
    ours=FUSED,
    one_thread_too=True,
    max_rounds=30,
)

if __name__ == "__main__":
    STUDY.main()
