"""Compares layers with others on a GPU: `make bench-gpu`, or `python -m benchmarks.gpu.run`.

The rivals are torch's layers (cuDNN), torchrl's modules for sequences with resets, the sLSTM of
flashrnn and xlstm, Python loops and compiled loops. A rival that is not installed has a row that
says so. Results are checked against float64 before anything is timed. If TRITON_INTERPRET is set,
this is a dry run: it runs tiny cases on the CPU, shows that everything works, and measures nothing.
"""

import copy
import importlib.metadata
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.gpu import dry_run
from benchmarks.gpu.contests import (
    COMPILED,
    CONTESTS,
    FLOAT32,
    OURS,
    RESETS,
    TF32,
    Contest,
    entries,
)
from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Row
from benchmarks.harness.gate import rival_error
from benchmarks.harness.grid import PACKED, SIZES, TRAINING
from benchmarks.harness.study import Document, Study, draw_input, statistics_of
from namernn_fast.bench.race import TimeBudget, TimedCall, race, timed
from namernn_fast.bench.tables import SLOWER, duration
from namernn_fast.bench.timed_calls import Input, call_of, results, tensors_in
from namernn_fast.machine.availability import gpu_path
from namernn_fast.testing import BudgetError, assert_within_budget

DRY = triton.knobs.runtime.interpret
DEVICE = "cpu" if DRY else "cuda"
RIVAL_LIMIT = 0.1
"""The largest error of a rival, relative to the largest value. A wrong formula is off by more."""
PACKAGES = ("triton", "torchrl", "flashrnn", "xlstm")
MEBI = 2**20


def input_of(contest: Contest) -> Input:
    """Returns the input: time-major, packed with random lengths, or batch-first for resets."""
    x: Any = draw_input(replace(contest, family="dense")).to(DEVICE, contest.dtype)
    if contest.family == PACKED:
        lengths = torch.randint(1, len(x) + 1, (contest.batch,))
        lengths[0] = len(x)
        return pack_padded_sequence(x, lengths, enforce_sorted=False)
    return x.transpose(0, 1).contiguous() if contest.group == RESETS else x


def event_clock(call: TimedCall, iterations: int = 1) -> float:
    """Returns the seconds per call, from CUDA events around `iterations` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(iterations):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / iterations / 1000


def last_names(named: Any) -> dict[str, Any]:
    """Returns values by the last parts of their dotted names."""
    return {name.rpartition(".")[2]: value for name, value in dict(named).items()}


class Checked:
    """The modules and the calls of a contest with correct results, and why others are absent."""

    def __init__(self, contest: Contest) -> None:
        self.mode, self.dtype, self.x = contest.mode, contest.dtype, input_of(contest)
        self.modules: dict[str, nn.Module] = {}
        self.calls: dict[str, TimedCall] = {}
        self.absent: dict[str, str] = {}
        torch.manual_seed(0)
        name, reference, makers = entries(contest, DEVICE)
        reference.to(DEVICE, self.dtype)
        self.parameters = last_names(reference.named_parameters())
        self.gradient = torch.randn_like(tensors_in(reference(self.x))[0])
        x: Any = self.x
        _, self.oracle = self.run(copy.deepcopy(reference).double(), x.to(torch.float64))
        theirs = self.enter(name, lambda: reference)
        ours = self.enter(OURS, makers.pop(OURS))
        if theirs is None or ours is None:
            raise BudgetError(f"{self.absent}")
        precision = "medium" if contest.precision == TF32 else "highest"
        assert_within_budget(ours, theirs, self.oracle, precision)  # type: ignore[arg-type]
        for name, make in makers.items():
            self.enter(name, make)

    def run(self, module: nn.Module, x: Any) -> tuple[TimedCall, dict[str, Tensor]]:
        """Returns the call of a module and its results: the output and gradients, by name."""
        module.train(self.mode == TRAINING)
        data = tensors_in((x,))[0]
        call = call_of(module, x, self.mode, (self.gradient.to(data.dtype),))
        return call, last_names(results(module, call, self.mode))  # type: ignore[arg-type]

    def enter(self, name: str, make: Any) -> dict[str, Tensor] | None:
        """Adds a module with the parameters of the reference.

        Returns its results, or None if it cannot run or if they are wrong.
        """
        try:
            with torch.inference_mode(False):  # torchrl tests a backward pass here
                module = make().to(DEVICE, self.dtype)
            with torch.no_grad():
                for key, value in last_names(module.named_parameters()).items():
                    if key in self.parameters:
                        value.copy_(self.parameters[key])
            call, found = self.run(module, self.x)
            call()  # replays the graph of a compiled loop
        except ImportError:
            self.absent[name] = "not installed"
            return None
        except Exception as error:  # whatever a rival raises
            self.absent[name] = f"failed: {error}"
            return None
        shared = {key: value for key, value in self.oracle.items() if key in found}
        if wrong := rival_error(name, found, shared, RIVAL_LIMIT):
            self.absent[name] = f"wrong: {wrong}"
            return None
        self.modules[name], self.calls[name] = module, call
        return found

    def peak_bytes(self, name: str) -> int:
        """Returns how many bytes of GPU memory a call needs at most; 0 in a dry run."""
        if DRY:
            return 0
        self.modules[name].zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.calls[name]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class GpuStudy(Study):
    """A study that measures times and memory on a GPU until its deadline."""

    deadline: float = math.inf

    def measure(self, case: Contest, budget: TimeBudget) -> Row:
        if time.monotonic() > self.deadline:
            name, _, makers = entries(case, "cpu")
            absent = dict.fromkeys((name, *makers), "out of time")
            return statistics_of({}) | {"absent": absent, "peak": {}}
        torch.compiler.reset()
        tf32 = case.precision == TF32
        try:
            with gpu_path("kernel"), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                torch.set_float32_matmul_precision("high" if tf32 else "highest")
                checked = Checked(case)
                rounds = race(checked.calls, budget, clock=timed if DRY else event_clock)
                peak = {name: checked.peak_bytes(name) for name in checked.calls}
        except RuntimeError as error:  # keeps the rows of the other contests
            raise BudgetError(f"failed: {error}") from error
        return statistics_of(rounds, OURS) | {"absent": checked.absent, "peak": peak}


def table(rows: list[Row]) -> str:
    """Returns a table with a line for each rival of each contest."""
    lines = [
        {**row, "rival": name}
        for row in rows
        for name in (*row["medians"], *row["absent"])
        if name != OURS
    ]
    return columns.table(lines, COLUMNS)


def theirs(row: Row) -> str:
    """Returns the time of the rival, or the start of why there is none."""
    name, medians = row["rival"], row["medians"]
    return duration(medians[name]) if name in medians else row["absent"][name].split("\n")[0][:60]


def speed_up(row: Row) -> float | None:
    medians = row["medians"]
    return medians[row["rival"]] / medians[OURS] if row["rival"] in medians else None


def memory(row: Row, name: str) -> str:
    """Returns the peak memory of a call. That of CUDA graphs is not known."""
    peak = row["peak"].get(name) if name != COMPILED else None
    return "" if peak is None else f"{peak / MEBI:.1f} MiB"


COLUMNS = (
    columns.key("cell", "cell"),
    columns.key("input", "family"),
    SHAPE,
    BATCH,
    columns.key("precision", "precision"),
    columns.key("rival", "rival"),
    columns.text("its time", theirs),
    columns.time(OURS),
    columns.speed_up("speed-up", speed_up),
    columns.text("its memory", lambda row: memory(row, row["rival"])),
    columns.text("ours", lambda row: memory(row, OURS)),
)


def facts() -> Document:
    """Returns the GPU and the versions of the libraries."""
    installed = {package.metadata["Name"] for package in importlib.metadata.distributions()}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    gpu = (
        "none: times in Triton's interpreter mean nothing" if DRY else torch.cuda.get_device_name()
    )
    found |= {"CUDA": torch.version.cuda} | (
        {} if DRY else {"cuDNN": torch.backends.cudnn.version()}
    )
    return {"gpu": gpu, "versions": found, "interpreted": dict(dry_run.calls)}


def caption(document: Document) -> str:
    """Returns what the tables show."""
    libraries = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    return (
        f"GPU: {document['gpu']}; {libraries}. CUDA events time calls from Python, after the "
        "compilation. `forward` is under `inference_mode`; `forward + backward` computes the "
        "gradients of all parameters from a fixed random gradient at the output. `tf32` lets all "
        "float32 products use TF32, `float32` none. GRU and LSTM run our kernel. The lengths of "
        "packed batches are uniform. Compiled loops use CUDA graphs, whose memory is not known. "
        f"Memory is the peak above what is allocated before a call. {SIZES} {SLOWER} marks a loss."
    )


STUDY = GpuStudy(
    name="gpu",
    description=__doc__,
    cases=CONTESTS,
    table=table,
    caption=caption,
    by=("group", "mode"),
    facts=facts,
    ours=OURS,
)


def main() -> None:
    parser = pages.parser(__doc__, STUDY.seconds)
    what = "start no contest after this many minutes"
    parser.add_argument("--minutes", type=float, default=8.0, help=what)
    options = pages.parse(parser)
    study = replace(STUDY, deadline=time.monotonic() + 60 * options.minutes)
    if DRY and options.record:
        parser.error("a dry run is not a measurement and cannot be recorded")
    if DRY:
        tiny = {"batch": 3, "input_size": 8, "hidden_size": 8, "seq_len": 3, "precision": FLOAT32}
        cases = [*dict.fromkeys(replace(case, **tiny) for case in CONTESTS)]
        study, options.quick = replace(study, cases=cases), True
        dry_run.treat_cpu_as_gpu()
    elif not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; DRY_RUN=1 needs none")
    study.main(options)


if __name__ == "__main__":
    main()
