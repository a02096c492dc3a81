"""Race the layer against cuDNN on a GPU: `make bench-gpu`, or `python -m benchmarks.gpu [options]`.

It needs a GPU, torch, Triton and NumPy, but no installed package, extension, network or matplotlib,
without which the plots are left out. `--dry-run` runs the same code on the CPU, the kernels under
Triton's interpreter, on tiny cells: it shows that everything works, and measures nothing.

The grid is a cut: batch sizes from 1 to 4096, hidden sizes from 64 to 2048 and 8 to 1024 steps all
occur, but not every product of them. No cell is timed before its numbers have met the gate, and
none is dropped: what is red, failed or came too late has its place in the table and in the JSON.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from triton.errors import TritonError
from triton.testing import do_bench

from benchmarks.harness import gate, surnames
from benchmarks.harness.grid import BASELINE, DENSE, FORWARD, FUSED, MODES, PACKED, TRAINING, Cell
from benchmarks.harness.paths import RESULTS, SCRATCH
from benchmarks.harness.race import Call, timed
from benchmarks.harness.tables import SLOWER, markdown, ratio, shape
from benchmarks.harness.workload import Input, train
from namernn_fast import FusedRNN, explain, gpu, ops
from namernn_fast.gpu import device as gpu_device
from namernn_fast.names import NamesData, encode_names
from namernn_fast.names.data import embedded_sample

# By (input_size, hidden_size, seq_len), in the order in which they are timed.
BATCHES = {
    (64, 64, 8): (1, 64, 1024, 4096),
    (64, 256, 8): (1, 16, 64, 256, 1024, 4096),
    (128, 128, 128): (1, 16, 64, 256, 1024, 4096),
    (512, 512, 128): (1, 16, 64, 256, 1024),
    (1024, 1024, 64): (1, 64, 1024),
    (2048, 2048, 32): (1, 64, 512),
    (64, 64, 1024): (1, 64),
    (256, 256, 1024): (1, 64),
}
PACKED_SHAPE = (64, 256)
PACKED_BATCHES = (1, 16, 64, 256, 1024, 4096)
CELLS = (
    *(
        Cell(DENSE, mode, batch, *shape)
        for shape, batches in BATCHES.items()
        for batch in batches
        for mode in MODES
    ),
    *(Cell(PACKED, mode, batch, *PACKED_SHAPE) for batch in PACKED_BATCHES for mode in MODES),
)
DRY_CELLS = tuple(
    Cell(family, mode, 3, 4, 5, seq_len)
    for family, seq_len in ((DENSE, 3), (PACKED, None))
    for mode in MODES
)

FLASH = "FlashRNN"
# It rounds in its own ways; a wrong formula is off by far more.
FLASH_ERROR = 0.05
# Seconds in which it compiles itself for one cell, about.
FLASH_COMPILES = 120

EAGER, GRAPH = "eager", "CUDA graph"
MEASURED, RED, FAILED, LATE = "measured", "red gate", "failed", "not measured"

# The gate looks at the states of so many sequences of a dense batch, and at all gradients.
GATE_ROWS = 64
MILLISECONDS = {"warmup": 5, "rep": 10}
NOTHING = ("", "", "")

Row = dict[str, Any]


@dataclass(frozen=True)
class Precision:
    """What a cell is computed in; `tf32` lets products of float32 round their factors."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @contextmanager
    def of_the_process(self) -> Iterator[None]:
        """Products and recurrences in it; afterwards as before."""
        knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
        before = [knob.fp32_precision for knob in knobs]
        try:
            for knob in knobs:
                knob.fp32_precision = "tf32" if self.tf32 else "ieee"
            yield
        finally:
            for knob, precision in zip(knobs, before, strict=True):
                knob.fp32_precision = precision


FLOAT32 = Precision("float32", torch.float32)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
PRECISIONS = (FLOAT32, BFLOAT16, Precision("tf32", torch.float32, tf32=True))


@dataclass(frozen=True)
class Platform:
    """Where the cells run, how a call is launched there and timed, in seconds for each call, and
    how one learns which path the layer takes."""

    device: str
    cells: tuple[Cell, ...]
    precisions: tuple[Precision, ...]
    launches: Mapping[str, Callable[[Call], Call]]
    clock: Callable[[Call], list[float]]
    path: Callable[[nn.RNN, Input], str]


def captured(call: Call) -> Call:
    """The call as a CUDA graph; what it returns lies where the replay has just written it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch wants it: lazy set-up is not to be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()

    def replay() -> object:
        graph.replay()
        return returned

    return replay


def event_clock(call: Call) -> list[float]:
    return [1e-3 * ms for ms in do_bench(call, **MILLISECONDS, return_mode="all")]


def wall_clock(call: Call) -> list[float]:
    return [timed(call) for _ in range(2)]


def eager(call: Call) -> Call:
    return call


def explained_path(layer: nn.RNN, input: Input) -> str:
    return explain(layer, input).path


GPU = Platform(
    "cuda", CELLS, PRECISIONS, {EAGER: eager, GRAPH: captured}, event_clock, explained_path
)
DRY = Platform("cpu", DRY_CELLS, (FLOAT32,), {EAGER: eager}, wall_clock, explained_path)


class FlashElman(nn.RNN):
    """FlashRNN's `elman` over the parameters of `nn.RNN`, for dense input.

    It takes the projected input, so the projection is a product beside it.
    """

    def forward(self, input, hx=None):
        from flashrnn import flashrnn

        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        projected = linear(input, weight_ih, bias_ih).transpose(0, 1)
        states, last = flashrnn(
            projected[:, :, None, None],  # batch, steps, gates, heads, features
            weight_hh[None, None],
            bias_hh[None, None],
            function="elman",
            backend="cuda_fused",
            dtype=str(input.dtype).removeprefix("torch."),
        )
        return states[0, :, :, 0].transpose(0, 1), last[0, :, :, 0].transpose(0, 1)


def known_names() -> NamesData:
    """The names that lie at hand, else the embedded sample: nothing is downloaded."""
    at_hand = os.environ.get(surnames.VARIABLE) or surnames.SHARED.is_dir()
    return surnames.names() if at_hand else embedded_sample()


def draw_input(cell: Cell, dtype: torch.dtype, device: str) -> Input:
    """Dense and time-major, or packed with the lengths of names."""
    torch.manual_seed(1)
    lengths = None
    if cell.family == PACKED:
        known = encode_names([name for name, _ in known_names().rows]).lengths
        lengths = known[torch.randint(len(known), (cell.batch,))]
    steps = cell.seq_len or int(lengths.max())
    input = torch.randn(steps, cell.batch, cell.input_size).to(device, dtype)
    return input if lengths is None else pack_padded_sequence(input, lengths, enforce_sorted=False)


def call_of(layer: nn.RNN, input: Input, mode: str) -> Call:
    """What is timed, and what the gate looks at."""
    if mode == FORWARD:
        return partial(layer, input)
    return partial(train, layer, tuple(layer.parameters()), input)


def results(layer: nn.RNN, call: Call, mode: str) -> dict[str, Tensor]:
    """Make the call; its states, of a dense batch those of `GATE_ROWS`, and its gradients."""
    output, h_n = call()
    if isinstance(output, PackedSequence):
        named = {"output": output.data, "h_n": h_n}
    else:
        rows = torch.linspace(0, h_n.shape[1] - 1, min(h_n.shape[1], GATE_ROWS)).long()
        named = {"output": output[:, rows], "h_n": h_n[:, rows]}
    if mode == TRAINING:
        named |= {f"grad {name}": value.grad for name, value in layer.named_parameters()}
    return {name: value.detach().cpu() for name, value in named.items()}


def check_flash(got: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> None:
    for name, exact in oracle.items():
        error = gate.max_error(got[name], exact.numpy()) / float(exact.abs().max())
        if not error < FLASH_ERROR:
            raise gate.GateError(f"{FLASH} is off by {error:.2g} in {name}")


def baseline_path(input: Input) -> str:
    data = input.data if isinstance(input, PackedSequence) else input
    return "cuDNN" if torch.backends.cudnn.is_acceptable(data) else "ATen"


def race_cell(
    cell: Cell, precision: Precision, platform: Platform, rival: str = BASELINE
) -> Iterator[Row]:
    """A row for every way to launch. GateError or the GPU's own error where none can be timed.

    TF32 is as the process has it.
    """
    input = draw_input(cell, precision.dtype, platform.device)
    kinds = {BASELINE: nn.RNN, FUSED: FusedRNN} | ({FLASH: FlashElman} if rival == FLASH else {})
    torch.manual_seed(0)
    layers = {
        name: kind(cell.input_size, cell.hidden_size, device=platform.device, dtype=precision.dtype)
        for name, kind in kinds.items()
    }
    for layer in layers.values():
        layer.load_state_dict(layers[BASELINE].state_dict())
    paths = {
        "fused_path": platform.path(layers[FUSED], input),
        "nn.RNN_path": baseline_path(input),
    }

    with torch.inference_mode(cell.mode == FORWARD):
        look = partial(results, mode=cell.mode)
        precise = copy.deepcopy(layers[BASELINE]).double()
        oracle = look(precise, call_of(precise, input.to(torch.float64), cell.mode))
        calls = {name: call_of(layer, input, cell.mode) for name, layer in layers.items()}
        theirs = look(layers[BASELINE], calls[BASELINE])
        for launch, launched in platform.launches.items():
            row = {**label(cell, precision, launch, rival), **paths}
            raced, failures = launch_calls({name: calls[name] for name in (rival, FUSED)}, launched)
            try:
                if FUSED in raced:
                    gate.check(look(layers[FUSED], raced[FUSED]), theirs, oracle)
                if FLASH in raced:
                    check_flash(look(layers[FLASH], raced[FLASH]), oracle)
                row |= time_calls(raced, platform) | {"status": MEASURED}
            except (RuntimeError, TritonError) as error:
                failures.append(str(error))
            except gate.GateError as error:
                yield row | {"status": RED, "why": str(error)}
                continue
            yield row | ({"status": FAILED, "why": "; ".join(failures)} if failures else {})


def launch_calls(
    calls: Mapping[str, Call], launched: Callable[[Call], Call]
) -> tuple[dict[str, Call], list[str]]:
    """The calls as they are launched, and the errors of those that cannot be."""
    raced, failures = {}, []
    for name, call in calls.items():
        try:
            raced[name] = launched(call)
        except (RuntimeError, TritonError) as error:
            failures.append(f"{name}: {error}")
    return raced, failures


def time_calls(calls: Mapping[str, Call], platform: Platform) -> Row:
    """Two laps in opposite order, so that neither call always follows the other."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in (*calls, *reversed([*calls])):
        seconds[name] += platform.clock(calls[name])
    return {
        "medians": {name: statistics.median(found) for name, found in seconds.items()},
        "seconds": {name: [float(f"{s:.4g}") for s in found] for name, found in seconds.items()},
    }


def label(cell: Cell, precision: Precision, launch: str, rival: str) -> Row:
    return {
        **dataclasses.asdict(cell),
        "precision": precision.name,
        "launch": launch,
        "rival": rival,
    }


def run(platform: Platform, deadline: float) -> Iterator[Row]:
    """All rows of the grid, in order; what would begin after the deadline comes as not measured."""
    plan = [(cell, p, BASELINE) for p in platform.precisions for cell in platform.cells]
    if platform is GPU and importlib.util.find_spec("flashrnn") is not None:
        # Last, for it is compiled at its first call.
        plan += [(cell, BFLOAT16, FLASH) for cell in platform.cells if cell.family == DENSE]
    for cell, precision, rival in plan:
        late = time.monotonic() > deadline - (FLASH_COMPILES if rival == FLASH else 0)
        outcome = {"status": LATE, "why": "the deadline had passed"}
        found: list[Row] = []
        try:
            if not late:
                with precision.of_the_process():
                    found = list(race_cell(cell, precision, platform, rival))
        except (RuntimeError, TritonError) as error:
            outcome = {"status": FAILED, "why": str(error)}
        found = found or [
            label(cell, precision, launch, rival) | outcome for launch in platform.launches
        ]
        print(f"{cell} {precision.name} against {rival}: {found[-1]['status']}", flush=True)
        yield from found


def speed_up(row: Row) -> float:
    return row["medians"][row["rival"]] / row["medians"][FUSED]


def title(row: Row) -> str:
    return f"{Cell.of(row)} {row['precision']} {row['launch']}"


def entries(row: Row) -> list[str]:
    """Microseconds of both and their ratio, or in its place why there is none."""
    medians = row.get("medians", {})
    times = [
        f"{1e6 * medians[layer]:.1f}" if layer in medians else "" for layer in (row["rival"], FUSED)
    ]
    return [*times, ratio(speed_up(row)) if row["status"] == MEASURED else row["status"]]


def table(rows: list[Row], rival: str) -> str:
    """A line for each shape, batch size, precision and launch, with the modes side by side."""
    modes = [f"{mode}: {rival}" for mode in MODES]
    head = ["(D, H, T)", "B", "precision", "launch"]
    for mode in modes:
        head += [mode, FUSED, "speed-up"]
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        place = (shape(Cell.of(row)), str(row["batch"]), row["precision"], row["launch"])
        lines.setdefault(place, {})[row["mode"]] = entries(row)
    return markdown(
        [
            head,
            *(
                [*place, *(entry for mode in MODES for entry in found.get(mode, NOTHING))]
                for place, found in lines.items()
            ),
        ]
    )


def summary(rows: list[Row]) -> str:
    """Geometric mean and worst cell for each mode, precision and launch, and for each mode."""
    lines = [["mode", "precision", "launch", "cells", "geometric mean", "worst", "its cell"]]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["precision"], row["launch"]), []).append(row)
        groups.setdefault((row["mode"], "all", "all"), []).append(row)
    for group, members in sorted(groups.items()):
        ratios = {title(row): speed_up(row) for row in members}
        worst = min(ratios, key=ratios.__getitem__)
        mean = statistics.geometric_mean(ratios.values())
        lines.append([*group, str(len(ratios)), ratio(mean), ratio(ratios[worst]), worst])
    return markdown(lines)


def listed(what: str, rows: list[str]) -> str:
    return "\n".join((f"{what}: {len(rows)}", *(f"- {row}" for row in rows)))


def section(rows: list[Row], rival: str) -> str:
    rows = [row for row in rows if row["rival"] == rival]
    measured = [row for row in rows if row["status"] == MEASURED]
    parts = [f"## Against {rival}", summary(measured) if measured else "Nothing was measured."]
    slower = [f"{title(row)} {speed_up(row):.2f}" for row in measured if speed_up(row) < 1]
    parts.append(listed(f"{FUSED} under 1.0x", slower))
    for status in (RED, FAILED):
        found = [f"{title(r)}: {r['why'].splitlines()[0]}" for r in rows if r["status"] == status]
        parts.append(listed(status, found))
    parts.append(listed(LATE, [title(row) for row in rows if row["status"] == LATE]))
    elsewhere = [row for row in measured if not row["fused_path"].startswith("triton")]
    parts.append(listed(f"{FUSED} not on Triton", [title(row) for row in elsewhere]))
    not_cudnn = [row for row in measured if row["nn.RNN_path"] != "cuDNN"]
    parts.append(listed(f"{BASELINE} not on cuDNN", [title(row) for row in not_cudnn]))
    return "\n\n".join((*parts, table(rows, rival)))


def describe(platform: Platform) -> dict[str, Any]:
    """The machine and the libraries, as far as a reader needs them to compare."""
    on_gpu, names = platform is GPU, known_names()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "Triton's interpreter",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "triton": triton.__version__,
        "names": f"{len(names.rows):,} {'of the embedded sample' if names.is_sample else 'names'}",
    }


def report(document: dict[str, Any]) -> str:
    machine = document["machine"]
    how = (
        "Medians in microseconds of `triton.testing.do_bench`, which empties the L2 cache before "
        "every call; each layer has two laps, in opposite order. `eager` is a call from Python: "
        "emptying the cache takes the GPU a while, and hides as much of the launching. "
        "`CUDA graph` is one replay."
        if document["measurement"]
        else "A dry run under Triton's interpreter: its times mean nothing."
    )
    introduction = (
        f"{machine['device']}; torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN "
        f"{machine['cudnn']}, Triton {machine['triton']}. {how} `{FORWARD}` is under "
        f"`inference_mode`; `{TRAINING}` has the gradients of all parameters from `h_n.sum()`. "
        f"Packed batches have the lengths of names, drawn from {machine['names']}, and are "
        "packed outside of what is timed. Every cell met the gate, in every precision and launch, "
        f"before it was timed. {SLOWER} marks a loss."
    )
    rivals = dict.fromkeys(row["rival"] for row in document["rows"])
    return "\n\n".join((introduction, *(section(document["rows"], r) for r in rivals))) + "\n"


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Speed-up against batch size: a figure a mode and launch, a panel a shape."""
    from matplotlib import pyplot

    from benchmarks.report.speed import save_figure

    pyplot.switch_backend("Agg")
    figures: dict[tuple[str, str], dict[str, dict[str, dict[Cell, dict[str, float]]]]] = {}
    for row in rows:
        if row["status"] == MEASURED and row["rival"] == BASELINE:
            panels = figures.setdefault((row["mode"], row["launch"]), {})
            lines = panels.setdefault(shape(Cell.of(row)), {})
            lines.setdefault(row["precision"], {})[Cell.of(row)] = row["medians"]
    paths = []
    for (mode, launch), panels in figures.items():
        file = "_".join(("gpu", *f"{mode} {launch}".lower().replace("+", "and").split()))
        paths.append(save_figure(folder / f"{file}.png", f"{mode}, {launch}", panels, "precision"))
    return paths


def restart_interpreted() -> None:
    """Start this command again with the interpreter, which Triton has to know before it loads."""
    sys.stdout.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})


class Interpreted:
    """The Triton operators in the place of the CPU's, counting how often they run.

    Of this process: nothing brings the others back.
    """

    # What the rule is told: any GPU would do.
    DEVICE = gpu_device.Device("cuda", "sm_90", 227 * 1024, 132)

    def __init__(self) -> None:
        self.calls = dict.fromkeys(("rnn_forward", "rnn_backward"), 0)
        self.library = torch.library.Library(ops.NAMESPACE, "IMPL")
        for name in self.calls:
            self.library.impl(name, partial(self.run, name), "CPU")
        # Neither asks a device that is none, nor for the C++ extension.
        gpu_device.find_device = lambda index: self.DEVICE
        ops.why_not_cpu_kernel = lambda input: None

    def run(self, name: str, *arguments: Any) -> Any:
        self.calls[name] += 1
        return getattr(gpu, name)(*arguments)

    def path(self, layer: nn.RNN, input: Input) -> str:
        """`triton` if training calls both of its operators once, or GateError."""
        before = dict(self.calls)
        train(layer, tuple(layer.parameters()), input)
        if any(self.calls[name] != before[name] + 1 for name in self.calls):
            raise gate.GateError(f"Triton was not what ran: {before}, then {self.calls}")
        return "triton, interpreted"


def check_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --dry-run needs none")
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be measured")


def exit_status(rows: list[Row]) -> int:
    """That a graph cannot be captured is a result; that a call fails or is wrong is an error."""
    bad = [r for r in rows if r["status"] == RED or (r["status"], r["launch"]) == (FAILED, EAGER)]
    return 1 if bad else 0


def publish(document: dict[str, Any], folder: Path) -> None:
    """Raw rows, the table and, with matplotlib, the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    text = report(document)
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the plots are left out")
    else:
        plot(document["rows"], folder)


def main() -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny cells under the interpreter")
    parser.add_argument("--minutes", type=float, default=7.0, help="no cell is begun after so many")
    parser.add_argument("--output", type=Path, help="the folder for table, JSON and plots")
    options = parser.parse_args()
    if not options.dry_run:
        check_gpu()
    elif not triton.knobs.runtime.interpret:
        restart_interpreted()
    platform = dataclasses.replace(DRY, path=Interpreted().path) if options.dry_run else GPU

    rows: list[Row] = []
    document = {"machine": describe(platform), "measurement": platform is GPU, "rows": rows}
    try:
        rows.extend(run(platform, begun + 60 * options.minutes))
    finally:  # what is measured is kept, whatever ended it
        publish(document, options.output or (SCRATCH if options.dry_run else RESULTS))
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
