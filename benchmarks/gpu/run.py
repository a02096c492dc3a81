"""Times layers on a GPU against the ways people run them today: `python -m benchmarks.gpu.run`.

Each way trains the same weights on the same input. Its output and gradients are compared with a
loop in float64 before it is timed. `--dry-run` needs no GPU: it runs every case once at a small
size, with kernels in Triton's interpreter, and times nothing.
"""

import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.gpu.interpreted import serve_cpu_tensors
from benchmarks.harness import pages
from namernn_fast import FusedGRU, FusedLSTM, FusedRNN, recurrent_cell
from namernn_fast.bench.race import TimeBudget, race
from namernn_fast.machine.availability import gpu_path
from namernn_fast.testing import BudgetError, assert_within_budget

SIZES = (128, 128, 256), (128, 128, 512)
"""Steps, sequences, and features and units."""
DRY_SIZES = ((3, 2, 16),)
RESETS = 0.03
"""The share of steps at which an episode starts."""
OURS, KERNEL = "namernn_fast", "namernn_fast, Triton"
PAIRS = {FusedRNN: nn.RNN, FusedGRU: nn.GRU, FusedLSTM: nn.LSTM}


@recurrent_cell(gates=4, states=2, gate_parameters={"gain": 1.0, "shift": 0.0})
def norm_lstm(x: Any, u: Any, h: Any, c: Any, gain: Any, shift: Any) -> Any:
    """An LSTM that normalises the sums of each gate over the units."""

    def norm(k: int) -> Any:
        z = x[k] + u[k]
        z = z - z.mean(-1, keepdim=True)
        scale = torch.rsqrt((z * z).mean(-1, keepdim=True) + 1e-5)
        return gain[k] * z * scale + shift[k]

    c = torch.sigmoid(norm(1)) * c + torch.sigmoid(norm(0)) * torch.tanh(norm(2))
    return torch.sigmoid(norm(3)) * torch.tanh(c), c


@recurrent_cell(gates=2)
def minimal_gated_unit(x: Any, u: Any, h: Any) -> Any:
    """A minimal gated unit whose candidate gates the product of the state."""
    f = torch.sigmoid(x[0] + u[0])
    return h + f * (torch.tanh(x[1] + f * u[1]) - h)


@recurrent_cell(gates=1, states=2, parameters={"rate": 0.0})
def leaky_unit(x: Any, u: Any, h: Any, v: Any, rate: Any) -> Any:
    """A leaky integrator with a trained rate."""
    a = torch.sigmoid(rate)
    v = (1 - a) * v + a * (x[0] + u[0])
    return torch.tanh(v), v


EQUATIONS = norm_lstm, minimal_gated_unit, leaky_unit
Run = Callable[[Any], Tensor]
"""Returns the output of the rows of all steps."""


@dataclass(frozen=True)
class Case:
    """Ways to train one layer.

    Each way is a function that makes the layer and returns it with its `Run`, or None if it needs a
    package that is not installed.
    """

    name: str
    sizes: tuple[int, int, int]
    ways: Mapping[str, Callable[[], tuple[nn.Module, Run]] | None]
    exact: Callable[[], tuple[nn.Module, Run]]
    """A way that is also correct in float64."""


def loop(cell: Any, layer: Any, x: Tensor) -> Tensor:
    """Runs a cell of one's own step by step, as a user would without this package."""
    definition = cell.__wrapped__
    gates = layer.weight_ih_l0.shape[0] // layer.hidden_size
    sums = linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    own = {}
    for name, parameter in layer.named_parameters():
        if not name.startswith(("weight", "bias")):
            value = parameter.unbind(0) if parameter.dim() == 2 else parameter
            own[name.removesuffix("_l0")] = value
    state = x.new_zeros(x.shape[1], layer.hidden_size)
    states = (state,) * (2 if cell in (norm_lstm, leaky_unit) else 1)
    outputs = []
    for rows in sums:
        u = linear(states[0], layer.weight_hh_l0, layer.bias_hh_l0)
        new = definition(rows.chunk(gates, -1), u.chunk(gates, -1), *states, **own)
        states = new if isinstance(new, tuple) else (new,)
        outputs.append(states[0])
    return torch.stack(outputs)


def loop_with_resets(layer: Any, reset: Tensor, x: Tensor) -> Tensor:
    """Runs torch's GRU or LSTM cell step by step, with states that restart from zeros."""
    step = torch.gru_cell if isinstance(layer, nn.GRU) else torch.lstm_cell
    weights = [*layer.parameters()]
    states: Any = x.new_zeros(x.shape[1], layer.hidden_size)
    states = (states, states) if isinstance(layer, nn.LSTM) else states
    outputs = []
    for rows, starts in zip(x, reset, strict=True):
        keep = (~starts).to(x.dtype).unsqueeze(-1)
        if isinstance(states, tuple):
            states = step(rows, tuple(state * keep for state in states), *weights)
        else:
            states = step(rows, states * keep, *weights)
        outputs.append(states[0] if isinstance(states, tuple) else states)
    return torch.stack(outputs)


def torchrl_module(cell: str, size: int, backend: str, reset: Tensor) -> tuple[nn.Module, Run]:
    """Returns a recurrent module of torchrl in recurrent mode."""
    from tensordict import TensorDict
    from torchrl import modules

    module = getattr(modules, f"{cell}Module")(
        size,
        size,
        in_key="x",
        out_key="y",
        default_recurrent_mode=True,
        recurrent_backend=backend,
    )
    is_init = reset.T.unsqueeze(-1)

    def run(x: Tensor) -> Tensor:
        batch = TensorDict({"x": x.transpose(0, 1), "is_init": is_init}, is_init.shape[:2])
        output: Tensor = module(batch)["y"]
        return output.transpose(0, 1)

    return module, run


def torch_cases(sizes: tuple[int, int, int], device: str) -> list[Case]:
    """Returns the cases that torch's layers run, dense and packed."""
    steps, batch, size = sizes
    lengths = torch.linspace(steps, max(steps // 4, 1), batch).long()

    def way(make: type, packs: bool, path: Any = None) -> tuple[nn.Module, Run]:
        layer = make(size, size)

        def run(x: Tensor) -> Tensor:
            input = pack_padded_sequence(x, lengths) if packs else x
            if path is None:
                output = layer(input)[0]
            else:
                with gpu_path(path):
                    output = layer(input)[0]
            return output.data if packs else output

        return layer, run

    return [
        Case(
            f"{theirs.__name__}, {'packed' if packs else 'dense'}",
            sizes,
            {
                "torch": partial(way, theirs, packs),
                OURS: partial(way, ours, packs),
                KERNEL: partial(way, ours, packs, "kernel"),
            },
            partial(way, theirs, packs),
        )
        for ours, theirs in PAIRS.items()
        for packs in (False, True)
    ]


def reset_cases(sizes: tuple[int, int, int], device: str) -> list[Case]:
    """Returns the cases with episodes that start inside a sequence."""
    steps, batch, size = sizes
    reset = (torch.rand(steps, batch) < RESETS).to(device)
    reset[0] = True
    cases = []
    for ours, theirs in (FusedGRU, nn.GRU), (FusedLSTM, nn.LSTM):
        name = theirs.__name__
        has_torchrl = importlib.util.find_spec("torchrl") is not None

        def looped(theirs: Any = theirs) -> tuple[nn.Module, Run]:
            layer = theirs(size, size)
            return layer, partial(loop_with_resets, layer, reset)

        def fused(ours: Any = ours) -> tuple[nn.Module, Run]:
            layer = ours(size, size)
            return layer, lambda x: layer(x, reset=reset)[0]

        ways: dict[str, Any] = {"loop": looped}
        for backend in ("triton", "scan", "pad"):
            rival = partial(torchrl_module, name, size, backend, reset)
            ways[f"torchrl, {backend}"] = rival if has_torchrl else None
        cases.append(Case(f"{name}, resets", sizes, ways | {OURS: fused}, looped))
    return cases


def equation_cases(sizes: tuple[int, int, int], device: str) -> list[Case]:
    """Returns the cases of cells that torch lacks."""
    _, _, size = sizes
    cases = []
    for cell in EQUATIONS:

        def looped(cell: Any = cell, compiles: bool = False) -> tuple[nn.Module, Run]:
            layer = cell.layer(size, size)
            run = partial(loop, cell, layer)
            return layer, torch.compile(run) if compiles else run

        def fused(cell: Any = cell) -> tuple[nn.Module, Run]:
            layer = cell.layer(size, size)
            return layer, lambda x: layer(x)[0]

        ways: dict[str, Any] = {"loop": looped, OURS: fused}
        if device != "cpu":
            ways["compiled loop"] = partial(looped, compiles=True)
        cases.append(Case(cell.__name__, sizes, ways, looped))
    return cases


def training_step(layer: nn.Module, run: Run, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Runs a training step, and returns the output and all gradients by name."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    output = run(leaf)
    output.backward(grad[: len(output)] if output.dim() == 2 else grad.view_as(output))
    results = {"output": output.detach(), "x": leaf.grad}
    for name, parameter in layer.named_parameters():
        results[name.rpartition(".")[2]] = parameter.grad
    return {name: value for name, value in results.items() if value is not None}


def made(make: Callable[[], tuple[nn.Module, Run]], like: nn.Module | None, device: str) -> Any:
    """Makes a way with the weights of `like`, or with new ones."""
    layer, run = make()
    if like is not None:
        pairs = zip(layer.parameters(), like.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.data = theirs.detach().clone()
    return layer.to(device), run


def measure(case: Case, device: str, budget: TimeBudget | None) -> dict[str, Any]:
    """Checks all ways of a case, and times them unless `budget` is None."""
    torch.manual_seed(0)
    steps, batch, size = case.sizes
    x = torch.randn(steps, batch, size, device=device)
    grad = torch.randn(steps * batch, size, device=device)
    layer, run = made(case.exact, None, device)
    calls: dict[str, Callable[[], Any]] = {}
    for name, make in case.ways.items():
        if make is not None:
            calls[name] = partial(training_step, *made(make, layer, device), x, grad)
    exact = training_step(layer.double(), run, x.double(), grad.double())
    first = next(iter(calls))
    theirs = calls[first]()
    for name in (OURS, KERNEL):
        if name in calls:
            assert_within_budget(calls[name](), theirs, exact)
    row: dict[str, Any] = {"case": case.name, "sizes": case.sizes, "milliseconds": {}, "MiB": {}}
    row["not installed"] = [name for name, make in case.ways.items() if make is None]
    if budget is None:
        return row

    def synchronized(call: Callable[[], Any]) -> None:
        call()
        torch.cuda.synchronize()

    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        synchronized(call)
        row["MiB"][name] = torch.cuda.max_memory_allocated() / 2**20
    raced = {name: partial(synchronized, call) for name, call in calls.items()}
    for name, rounds in race(raced, budget).items():
        row["milliseconds"][name] = 1e3 * statistics.median(rounds.seconds)
    return row


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a Markdown table: milliseconds of a training step and peak MiB."""
    lines = [
        "| case | steps, batch, units | way | ms | peak MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sizes = ", ".join(map(str, row["sizes"]))
        for name, milliseconds in row["milliseconds"].items():
            values = f"{milliseconds:.3g} | {row['MiB'][name]:.0f}"
            lines.append(f"| {row['case']} | {sizes} | {name} | {values} |")
        for name in row["not installed"]:
            lines.append(f"| {row['case']} | {sizes} | {name} | not installed | |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = pages.parser(str(__doc__))
    parser.add_argument("--dry-run", action="store_true", help="run without a GPU, time nothing")
    options = parser.parse_args(arguments)
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU was found: pass --dry-run to run every case once without one")
    device, sizes = ("cpu", DRY_SIZES) if options.dry_run else ("cuda", SIZES)
    library = serve_cpu_tensors() if options.dry_run else None
    budget = None if options.dry_run else TimeBudget(seconds=5)
    rows, wrong = [], []
    for size in sizes:
        for make in (torch_cases, reset_cases, equation_cases):
            for case in make(size, device):
                print(case.name, *case.sizes, flush=True)
                try:
                    rows.append(measure(case, device, budget))
                except BudgetError as error:
                    wrong.append(f"{case.name} {case.sizes}: {error}")
    del library
    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    document = {"device": name, "torch": torch.__version__, "rows": rows}
    print(report(rows))
    pages.publish("gpu", document, [], options.record and device == "cuda", wrong)


if __name__ == "__main__":
    main()
