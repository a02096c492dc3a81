"""What the layer's kernels take on an H100, on paper; `model_page.py` writes the page.

Nothing is measured. What a step takes is read off the machine code that the plan's kernels compile
to, as `make gpu-lint RECORD=1` recorded it; how fast the units of the GPU are is in `CONSTANTS`.
Legend: T steps, B sequences, H hidden units, D input features.
"""

import math
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.grid import Precision
from benchmarks.gpu.lint import budgets, chain
from benchmarks.gpu.lint.cases import DENSE, DEVICES, Case
from benchmarks.gpu.lint.counts import Counts
from benchmarks.gpu.resources import Build, Resources, occupancy
from benchmarks.harness.grid import TRAINING, Cell
from namernn_fast import ops
from namernn_fast.gpu import device, launching, plan, problem, stack
from namernn_fast.names import encode_names
from namernn_fast.names.dataset import embedded_sample

DATASHEET = "NVIDIA's datasheet, as glennklockwood.com/garden/processors/h100 gives it"
TABLE = "table 3 of doi 10.1016/j.ultsonch.2023.106546"
GUIDE = "CUDA's programming guide, throughput of native arithmetic instructions, 9.0"
ASSUMED = "assumed"


@dataclass(frozen=True)
class Constant:
    """A figure of an H100 SXM5, its unit and where it comes from."""

    value: float
    unit: str
    meaning: str
    source: str


CONSTANTS = {
    "sms": Constant(132, "", "multiprocessors", DATASHEET),
    "clock": Constant(1.755e9, "1/s", "clock", TABLE),
    "issue": Constant(4, "1/cycle", "instructions of a warp, one multiprocessor", GUIDE),
    "arithmetic": Constant(4, "1/cycle", "of them in float32", GUIDE),
    "special": Constant(0.5, "1/cycle", "of them exponentials and reciprocals", GUIDE),
    "shuffles": Constant(1, "1/cycle", "of them shuffles", GUIDE),
    "shared": Constant(
        128, "B/cycle", "shared memory, one multiprocessor", f"{TABLE}: 32,348 GB/s over 144"
    ),
    "l2_port": Constant(64, "B/cycle", "L2, one multiprocessor", ASSUMED),
    "l2": Constant(8.986e12, "B/s", "L2, all multiprocessors together", TABLE),
    "hbm": Constant(3.35e12, "B/s", "device memory", DATASHEET),
    "float32": Constant(66.9e12, "FLOP/s", "float32, on the CUDA cores", DATASHEET),
    "tf32": Constant(494.7e12, "FLOP/s", "TF32, on the tensor cores, dense", DATASHEET),
    "bfloat16": Constant(989.4e12, "FLOP/s", "bfloat16, on the tensor cores, dense", DATASHEET),
    "latency of arithmetic": Constant(chain.ARITHMETIC, "cycles", "an instruction's result", TABLE),
    "latency of shared": Constant(chain.SHARED, "cycles", "a load from shared memory", TABLE),
    "latency of l2": Constant(chain.L2, "cycles", "an access to L2", TABLE),
    "latency of shuffles": Constant(chain.SHUFFLE, "cycles", "a shuffle", ASSUMED),
    "latency of special": Constant(chain.SPECIAL, "cycles", "a special function", ASSUMED),
    "latency of tensor": Constant(chain.TENSOR, "cycles", "a tile on tensor cores", ASSUMED),
    "latency of barriers": Constant(chain.BARRIER, "cycles", "a program's barrier", ASSUMED),
    "node": Constant(1e-6, "s", "from one kernel of a CUDA graph to the next", ASSUMED),
}
BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
# Rows and columns of the tiles of a product that runs by itself, for what it reads from L2.
PRODUCT_TILE = 128
# The largest hidden sizes for which PyTorch has cuDNN run a persistent kernel, as
# `use_rnn_persist_small_h` in its aten/src/ATen/native/cudnn/RNN.cpp says.
PERSISTENT = {"forward": 384, "backward": 256}


def of(name: str) -> float:
    """Returns the value of a constant."""
    return CONSTANTS[name].value


(H100,) = (known for known in DEVICES if known.arch == "sm_90")


@dataclass(frozen=True)
class Step:
    """One step of the recurrence: the cycles of each unit, which overlap."""

    kind: str
    cycles: dict[str, float]
    waves: int
    """How often programs take turns on the multiprocessors."""

    @property
    def seconds(self) -> float:
        return self.waves * max(self.cycles.values()) / of("clock")

    @property
    def bound(self) -> str:
        """What takes the most cycles."""
        return max(self.cycles, key=self.cycles.__getitem__)


@cache
def _record() -> tuple[budgets.Recorded, dict[str, Resources]]:
    return budgets.load()[1], budgets.taken()


def step(hidden_size: int, batch: int, precision: Precision, kernel: str) -> Step:
    """Returns a step of `forward` or `backward` with the plan that the layer makes."""
    chosen = plan.choose(hidden_size, batch, precision.dtype, H100, tf32=precision.tf32)
    case = Case(Build(H100, hidden_size, precision.dtype, chosen), kernel, DENSE, 1)
    counts, taken = (known.get(case.name) for known in _record())
    if counts is None or taken is None:
        raise SystemExit(f"{case.name} is not recorded: run make gpu-lint RECORD=1")
    programs = chosen.members * math.ceil(batch / chosen.block_b)
    at_once = max(1, round(occupancy(H100, chosen, taken) * 64 / chosen.warps))
    on_one = math.ceil(programs / of("sms"))  # programs of one multiprocessor, in all waves
    waves = math.ceil(on_one / at_once)
    together = math.ceil(on_one / waves)
    busy = min(programs / waves, of("sms") * together)
    cycles = {
        unit: together * one for unit, one in _cycles(counts, chosen.warps, precision).items()
    }
    cycles["all of L2"] = busy * counts.global_bytes / of("l2") * of("clock")
    cycles["the chain of a warp"] = counts.chain
    return Step(chosen.kind, cycles, waves)


def _cycles(counts: Counts, warps: int, precision: Precision) -> dict[str, float]:
    """Returns the cycles of each unit of a multiprocessor that a step of one program takes."""
    tensor = counts.tensor_operations * of("sms") * of("clock")
    return {
        "issue slots": counts.instructions * warps / of("issue"),
        "float32": counts.arithmetic * warps / of("arithmetic"),
        "special functions": counts.special * warps / of("special"),
        "shuffles": counts.shuffles * warps / of("shuffles"),
        "tensor cores": tensor / of("tf32" if precision.tf32 else "bfloat16"),
        "shared memory": counts.shared_bytes / of("shared"),
        "the port to L2": counts.global_bytes / of("l2_port"),
    }


@cache
def lengths() -> tuple[int, ...]:
    """Returns the lengths of the names of the embedded sample, which every checkout has."""
    return tuple(encode_names([name for name, _ in embedded_sample().rows]).lengths.tolist())


def alive(cell: Cell) -> list[int]:
    """Returns how many sequences there are at each step."""
    if cell.seq_len is not None:
        return [cell.batch] * cell.seq_len
    known = lengths()
    shares = (sum(n > t for n in known) / len(known) for t in range(max(known)))
    return [math.ceil(cell.batch * share) for share in shares]


def kernels_of_passes(cell: Cell) -> list[str]:
    """Returns the kernels through time of a cell's mode."""
    return ["forward", "backward"] if cell.mode == TRAINING else ["forward"]


def product(rows: int, inner: int, columns: int, precision: str) -> float:
    """Returns the seconds of a matrix product from and to device memory."""
    values = rows * inner + inner * columns + rows * columns
    return max(2 * rows * inner * columns / of(precision), BYTES[precision] * values / of("hbm"))


def products(cell: Cell, precision: str) -> float:
    """Returns the seconds of what is parallel in time: the projection, and in training
    grad_weight_ih, grad_weight_hh and the sum for the biases."""
    rows, size, hidden = sum(alive(cell)), cell.input_size, cell.hidden_size
    seconds = product(rows, size, hidden, precision)
    if cell.mode == TRAINING:
        seconds += product(hidden, rows, size, precision) + product(hidden, rows, hidden, precision)
        seconds += BYTES[precision] * rows * hidden / of("hbm")
    return seconds


class _Launches(TorchDispatchMode):
    """Counts operators that launch a kernel: those that make or change values."""

    _NONE = ("empty", "view", "as_strided", "detach", "t.", "transpose", "select", "slice", "split")
    _NONE += ("unbind", "unflatten", "expand", "alias", "unsqueeze", "squeeze", "permute")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function).removeprefix("aten.").removeprefix("new_").removeprefix("_")
        self.count += not name.startswith(self._NONE)
        return function(*arguments, **(options or {}))


@cache
def kernels_of(cell: Cell, precision: Precision) -> int:
    """Returns how many kernels a call launches, by running the host's code without values."""
    count = _Launches()

    def launch(*arguments):
        count.count += 1

    def empty(*shape):
        return torch.empty(shape, dtype=precision.dtype, device="meta")

    hidden, size, batch, steps = cell.hidden_size, cell.input_size, cell.batch, len(alive(cell))
    layout = problem.SequenceLayout(*(None,) * 4, steps, batch, steps * batch, batch, 1)
    weights = [empty(hidden, size), empty(hidden, hidden), empty(hidden), empty(hidden)]
    layers = problem.Stack(layout, None, weights, ops.BIAS, 1, hidden)
    x = empty(steps * batch, size)
    with (
        mock.patch.object(device, "find_device", return_value=H100),
        mock.patch.object(plan, "may_round_to_tf32", return_value=precision.tf32),
        mock.patch.object(launching, "run", launch),
        count,
    ):
        outputs, h_n = stack.forward_stack(layers, x)
        if cell.mode == TRAINING:
            gradients = (torch.empty_like(outputs[0]), torch.empty_like(h_n), None)
            stack.backward_stack(layers, x, outputs, *gradients, False, [0])
    return count.count


def graph_seconds(cell: Cell, precision: Precision) -> float:
    """Returns the predicted seconds of one replay of a CUDA graph."""
    through_time = sum(
        # The plan is that of the whole batch; with fewer sequences alive a step takes no less.
        len(alive(cell)) * step(cell.hidden_size, cell.batch, precision, kernel).seconds
        for kernel in kernels_of_passes(cell)
    )
    launches = kernels_of(cell, precision) * of("node")
    return through_time + products(cell, precision.name) + launches


def rival_seconds(cell: Cell, precision: Precision) -> float | None:
    """Returns the predicted seconds of cuDNN's standard algorithm, with two kernels for each step:
    a product and the nonlinearity. None where PyTorch has cuDNN run a persistent kernel, about
    whose speed nothing is known.
    """
    if any(cell.hidden_size <= PERSISTENT[kernel] for kernel in kernels_of_passes(cell)):
        return None
    hidden, width = cell.hidden_size, BYTES[precision.name]
    seconds = 0.0
    for batch in alive(cell):
        weight = hidden**2 * math.ceil(batch / PRODUCT_TILE)
        states = batch * hidden * math.ceil(hidden / PRODUCT_TILE)
        work = (
            2 * batch * hidden**2 / of(precision.name),
            width * (weight + states) / of("l2"),
        )
        seconds += max(work) + 2 * of("node")
    return len(kernels_of_passes(cell)) * seconds + products(cell, precision.name)
