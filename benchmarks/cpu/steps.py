"""Times the step modules against torch's cells: `python -m benchmarks.cpu.steps [--record]`.

A step module runs torch's own cell if that is not slower, and then has a speed-up of about 1. Each
call gets states; in training, both states of an LSTM have gradients. With `--record` all sizes are
timed, both on `--threads` threads and on one; otherwise only a few, on `--threads` threads.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, MODES, TRAINING
from benchmarks.harness.spread import paired_speed_up
from namernn_fast import explain
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.cells import CELLS
from namernn_fast.nn.step_modules import STEP_MODULES, states_in
from namernn_fast.testing import assert_within_budget

MODULES: dict[str, tuple[type, type]] = {
    name: (cell.torch_step_module, STEP_MODULES[name])
    for name, cell in CELLS.items()
    if cell.torch_step_module
}
"""Torch's module and the step module of each cell."""
SIZES = (8, 64, 256, 512, 1024)  # input_size and hidden_size
BATCHES = (1, 8, 64)
FEW_SIZES, FEW_BATCHES = (8, 64, 512), (1, 64)
"""The sizes that are timed without `--record`."""

Inputs = tuple[Tensor, Any, tuple[Tensor, ...]]
"""The input of a step, its states, and the gradients of the new states."""


def draw(cell: str, size: int, batch: int) -> Inputs:
    """Draws the input and the states of a step, and the gradients of its new states."""
    generator = torch.Generator().manual_seed(1)
    x, *tensors = (torch.randn(batch, size, generator=generator) for _ in range(5))
    count = len(CELLS[cell].states)
    hx = tuple(tensors[:count])
    return x, hx if count == 2 else hx[0], tuple(tensors[2 : 2 + count])


def step_of(module: nn.RNNCellBase, mode: str, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a call that steps a module, and in training also runs its backward pass."""
    x, hx, gradients = inputs
    parameters = tuple(module.parameters())

    def train() -> tuple[Tensor, ...]:
        for parameter in parameters:
            parameter.grad = None
        states = states_in(module(x, hx))
        torch.autograd.backward(states, gradients)
        return tuple(states)

    return train if mode == TRAINING else lambda: tuple(states_in(module(x, hx)))


def results(module: nn.RNNCellBase, mode: str, inputs: Inputs) -> dict[str, Tensor]:
    """Returns the states after a step and, in training, the gradients of all parameters."""
    named = dict(zip("hc", step_of(module, mode, inputs)(), strict=False))
    if mode == TRAINING:
        named |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach() for name, value in named.items()}


def gated_calls(cell: str, mode: str, size: int, batch: int) -> dict[str, TimedCall]:
    """Returns the calls of torch's cell and of the step module, after the gate has passed."""
    torch.manual_seed(0)
    theirs, ours = (cls(size, size) for cls in MODULES[cell])
    ours.load_state_dict(theirs.state_dict())
    inputs = draw(cell, size, batch)
    exact = tree_map(Tensor.double, inputs)
    with torch.inference_mode(mode == FORWARD):
        found = [results(module, mode, inputs) for module in (ours, theirs)]
        oracle = results(copy.deepcopy(theirs).double(), mode, exact)
    assert_within_budget(*found, oracle)
    return {
        "torch": step_of(theirs, mode, inputs),
        "fused": step_of(ours, mode, inputs),
    }


def path_of(cell: str, size: int, batch: int, mode: str) -> str:
    """Returns what runs a step of the step module."""
    x, hx, _ = draw(cell, size, batch)
    with torch.inference_mode(mode == FORWARD):
        return explain(MODULES[cell][1](size, size), x, hx).path


def run(options: argparse.Namespace, wrong: list[str]) -> list[dict[str, Any]]:
    """Times every cell and size.

    Returns a row for each size with correct results, and adds the others to `wrong`.
    """
    rows = []
    budget = pages.time_budget(options, max_rounds=60)
    threads = sorted({1, options.threads}) if options.record else [options.threads]
    sizes, batches = (SIZES, BATCHES) if options.record else (FEW_SIZES, FEW_BATCHES)
    sizes = sizes[:2] if options.quick else sizes
    for count, cell, size, batch, mode in product(threads, MODULES, sizes, batches, MODES):
        pages.settle(count)
        row = {"threads": count, "cell": cell, "size": size, "batch": batch, "mode": mode}
        with pages.gated(row, wrong):
            calls = gated_calls(cell, mode, size, batch)
            with torch.inference_mode(mode == FORWARD):
                rounds = race(calls, budget)
            row["speed_up"] = paired_speed_up(rounds["torch"].seconds, rounds["fused"].seconds)
            row["medians"] = {name: statistics.median(r.seconds) for name, r in rounds.items()}
            row["path"] = path_of(cell, size, batch, mode)
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each module and size, and one with the worst ratios."""
    lines: dict[tuple[str, int, int], list[str]] = {}
    header, worst = ["module", "H", "B"], ["worst", "", ""]
    for mode in MODES:
        header += [f"{mode}: torch's cell", "step module", "path", "speed-up"]
        ratios = []
        for row in rows:
            if row["mode"] != mode:
                continue
            name = MODULES[row["cell"]][1].__name__
            start = [name, str(row["size"]), str(row["batch"])]
            line = lines.setdefault((name, row["size"], row["batch"]), start)
            ratios.append(row["speed_up"])
            line += [*map(duration, row["medians"].values()), row["path"], ratio(ratios[-1])]
        worst += ["", "", "", ratio(min(ratios)) if ratios else ""]
    return markdown([header, *lines.values(), worst])


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    parts = [
        f"{document['cpu']}; torch {document['torch']}; float32. H is the input size and the "
        "hidden size, B the batch size; `path` is what runs a step. Times are medians of rounds; "
        "a speed-up is the median of the ratios of neighbouring rounds."
    ]
    for threads in dict.fromkeys(row["threads"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["threads"] == threads]
        parts += [f"**Step modules, {threads} thread(s)**", table(rows)]
    return "\n\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=0.3))
    wrong: list[str] = []
    rows = run(options, wrong)
    document = {"cpu": cpu_name(), "torch": torch.__version__, "rows": rows}
    pages.publish("steps", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
