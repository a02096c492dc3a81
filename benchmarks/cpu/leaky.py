"""Times training with leaky layers: `python -m benchmarks.cpu.leaky [--record]`.

The rival is the recurrent layer of nn4n, the package of leaky networks for PyTorch, whose loop over
steps is written like those of laboratories. It runs on as many threads as are faster for it.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import pages
from benchmarks.harness.spread import race_on_threads
from namernn_fast import FusedLeakyRNN
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.testing import assert_within_budget

INPUT_SIZE, HIDDEN_SIZE = 10, 100
SHAPES = tuple(product((100, 255), (16, 64)))  # seq_len, batch
NONLINEARITIES = ("relu", "tanh")
RIVAL, FUSED, WITH_NOISE = "nn4n", "FusedLeakyRNN", "with noise"
THREADS = (2, 1)


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


def calls(nonlinearity: str, seq_len: int, batch: int) -> dict[str, TimedCall]:
    """Returns the calls of both layers, whose results meet the error budget, and with noise."""
    torch.manual_seed(0)
    rival, fused = layers(nonlinearity)
    x = torch.randn(seq_len, batch, INPUT_SIZE)
    gradient = torch.randn(seq_len, batch, HIDDEN_SIZE)
    noise = torch.randn(seq_len, batch, HIDDEN_SIZE) / 10
    exact = results(Equation.of(fused), x.double(), gradient.double())
    assert_within_budget(results(fused, x, gradient), results(rival, x, gradient), exact)
    return {
        RIVAL: lambda: step(rival, rival, x, gradient),
        FUSED: lambda: step(fused, fused, x, gradient),
        WITH_NOISE: lambda: step(fused, lambda x: fused(x, noise=noise), x, gradient),
    }


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every shape and nonlinearity on every number of threads; returns rows."""
    rows: list[dict[str, Any]] = []
    budget = pages.time_budget(options, max_rounds=30)
    shapes = SHAPES[:1] if options.quick else SHAPES
    for nonlinearity, (seq_len, batch) in product(NONLINEARITIES, shapes):
        row = {"nonlinearity": nonlinearity, "seq_len": seq_len, "batch": batch}
        with pages.gated(f"{nonlinearity}, {seq_len} steps, {batch} sequences", wrong):
            found = calls(nonlinearity, seq_len, batch)
            row["threads"] = race_on_threads(THREADS, found, budget, (RIVAL, FUSED))
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each row: medians, and speed-ups over nn4n on either number of threads."""
    lines = [
        ["act", "T", "B", RIVAL, "on 1 thread", FUSED, "speed-up", "95 %", WITH_NOISE, "1 thread"]
    ]
    for row in rows:
        two, one = (row["threads"][str(n)]["medians"] for n in THREADS)
        best = min(two[RIVAL], one[RIVAL])
        low, high = row["threads"][str(THREADS[0])]["spread"]
        scale = best / two[RIVAL]
        lines.append(
            [
                *(str(row[name]) for name in ("nonlinearity", "seq_len", "batch")),
                *(duration(medians[RIVAL]) for medians in (two, one)),
                duration(two[FUSED]),
                ratio(best / two[FUSED]),
                f"{low * scale:.2f} to {high * scale:.2f}",
                ratio(best / two[WITH_NOISE]),
                ratio(one[RIVAL] / one[FUSED]),
            ]
        )
    return markdown(lines)


def report(document: dict[str, Any]) -> str:
    """Returns the table of a run."""
    head = (
        f"{document['cpu']}, {THREADS[0]} threads; float32, forward and backward, "
        f"D = {INPUT_SIZE}, H = {HIDDEN_SIZE}. Speed-ups are over nn4n on the number of threads "
        "that is faster for it; the last column is one thread against one."
    )
    return f"{head}\n\n{table(document['rows'])}"


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.5))
    pages.settle(THREADS[0])
    wrong: list[str] = []
    document = {"cpu": cpu_name(), "rows": run(options, wrong)}
    pages.publish("leaky", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
