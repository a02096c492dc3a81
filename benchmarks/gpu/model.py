"""A roofline of the layer on an H100, on paper; `model_page.py` writes the page.

Nothing is measured: every figure follows from `CONSTANTS`. Legend: T steps, B sequences, H hidden
units, D input features, w bytes of a value.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch

from benchmarks.harness.grid import FORWARD, TRAINING, Cell
from namernn_fast.gpu.device import Device
from namernn_fast.gpu.plan import choose
from namernn_fast.names import encode_names
from namernn_fast.names.dataset import embedded_sample

DATASHEET = "NVIDIA's datasheet, as glennklockwood.com/garden/processors/h100 gives it"
TABLE = "table 3 of doi 10.1016/j.ultsonch.2023.106546"
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
    "float32": Constant(66.9e12, "FLOP/s", "float32, on the CUDA cores", DATASHEET),
    "tf32": Constant(494.7e12, "FLOP/s", "TF32, on the tensor cores, dense", DATASHEET),
    "bfloat16": Constant(989.4e12, "FLOP/s", "bfloat16, on the tensor cores, dense", DATASHEET),
    "hbm": Constant(3.35e12, "B/s", "device memory", DATASHEET),
    "l2": Constant(8.986e12, "B/s", "L2, all multiprocessors together", TABLE),
    "l2_port": Constant(64, "B/cycle", "L2, one multiprocessor", ASSUMED),
    "shared": Constant(
        128, "B/cycle", "shared memory, one multiprocessor", f"{TABLE}: 32,348 GB/s over 144"
    ),
    "on_chip": Constant(
        227 * 1024, "B", "shared memory of one program", "CUDA's programming guide"
    ),
    "chain": Constant(
        500, "cycles", "a step's chain: state, product, tanh, the program's own barrier", ASSUMED
    ),
    "barrier": Constant(1.5e-6, "s", "a barrier of the whole grid", f"{ASSUMED}: 1 to 2 µs"),
    "node": Constant(1e-6, "s", "from one kernel of a CUDA graph to the next", ASSUMED),
}
BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
# A tile of the tensor cores has 16 rows, used or not, and reads a weight once for 64 of them.
TILE_ROWS = 16
READ_ROWS = 64
# Columns of the tiles in which programs share out a step.
TILE_COLUMNS = (16, 32, 64, 128)
# Rows and columns of the tiles of a product that runs by itself, for what it reads from L2.
PRODUCT_TILE = 128
# Kernels of a call: projection and recurrence; in training also the recurrence backwards, two
# products and the bias.
KERNELS = {FORWARD: 2, TRAINING: 6}


def of(name: str) -> float:
    """Returns the value of a constant."""
    return CONSTANTS[name].value


def cycles(name: str) -> float:
    """Returns the seconds of a constant that is given in cycles."""
    return of(name) / of("clock")


def per_second(name: str) -> float:
    """Returns the rate per second of one multiprocessor, from a constant per cycle."""
    return of(name) * of("clock")


def padded(rows: int, precision: str) -> int:
    """Returns the rows that are computed: tensor cores, which float32 does not use, fill tiles."""
    return rows if precision == "float32" else TILE_ROWS * math.ceil(rows / TILE_ROWS)


def blocks(precision: str) -> tuple[int, ...]:
    """Returns how many sequences a program may have."""
    return (1, 16, 32, 64, 128) if precision == "float32" else (16, 32, 64, 128)


def from_shared(rows: int, hidden: int, columns: int, precision: str) -> float:
    """Returns the seconds of a program's reads from shared memory in one step.

    Tensor cores read weights from shared memory; in float32 weights stay in registers, and states
    are read.
    """
    values = rows * hidden
    if precision != "float32":
        values = hidden * columns * math.ceil(rows / READ_ROWS)
    return BYTES[precision] * values / per_second("shared")


@dataclass(frozen=True)
class Step:
    """One step of the recurrence: the seconds of each resource, which overlap, and its latency."""

    resources: dict[str, float]
    latency: dict[str, float] = field(
        default_factory=lambda: {"the step's own chain": cycles("chain")}
    )
    waves: int = 1
    """How often programs take turns on the multiprocessors."""

    @property
    def seconds(self) -> float:
        return self.waves * (max(self.resources.values()) + sum(self.latency.values()))

    @property
    def bound(self) -> str:
        """The largest single term."""
        terms = self.resources | self.latency
        return max(terms, key=terms.__getitem__)


def rows_in_and_out(batch: int, hidden: int, width: int) -> float:
    """Returns the seconds in which a step reads its projected rows and writes its states."""
    return 2 * batch * hidden * width / of("hbm")


def resident(batch: int, hidden: int, precision: str) -> Iterator[Step]:
    """Plans with one program for a block of sequences and weight_hh on chip."""
    weight = BYTES[precision] * hidden**2
    if weight > of("on_chip"):
        return
    for rows in blocks(precision):
        waves = math.ceil(math.ceil(batch / rows) / of("sms"))
        yield Step(
            {
                "multiply-adds": 2 * rows * hidden**2 * of("sms") / of(precision),
                "shared memory": from_shared(rows, hidden, hidden, precision),
                "device memory": rows_in_and_out(batch, hidden, BYTES[precision]) / waves,
            },
            waves=waves,
        )


def streamed(batch: int, hidden: int, precision: str) -> Iterator[Step]:
    """Plans that read weight_hh from L2 at every step: by one program for a block of sequences, or
    in tiles that all programs share out, with one barrier of the grid for each step."""
    width, sms = BYTES[precision], of("sms")
    for rows, columns in itertools.product(blocks(precision), (*TILE_COLUMNS, hidden)):
        programs = math.ceil(batch / rows) * math.ceil(hidden / columns)
        turns, together = math.ceil(programs / sms), min(programs, sms)
        read = width * hidden * (columns + (rows if columns < hidden else 0))
        yield Step(
            {
                "multiply-adds": turns * 2 * rows * columns * hidden * sms / of(precision),
                "L2": turns * max(read * together / of("l2"), read / per_second("l2_port")),
                "device memory": rows_in_and_out(batch, hidden, width),
            },
            {"the step's own chain": cycles("chain") * (turns if columns == hidden else 1)}
            | ({"the barrier": of("barrier")} if columns < hidden else {}),
        )


def cooperative(batch: int, hidden: int, precision: str) -> Iterator[Step]:
    """Plans that cut weight_hh over the programs of a group, with one barrier of the grid for each
    step. Each group has its share of the sequences, whose states its programs read from L2."""
    width, sms = BYTES[precision], of("sms")
    for groups in (2**power for power in range(8)):
        for members in (2**power for power in range(1, 8)):
            own = width * hidden**2 / members
            if groups * members > sms or groups > batch or own > of("on_chip"):
                continue
            rows = padded(math.ceil(batch / groups), precision)
            states = width * rows * hidden
            yield Step(
                {
                    "multiply-adds": 2 * rows * hidden**2 / members * sms / of(precision),
                    "shared memory": from_shared(rows, hidden, hidden // members, precision),
                    "L2": max(states * groups * members / of("l2"), states / per_second("l2_port")),
                    "device memory": rows_in_and_out(batch, hidden, width),
                },
                {"the step's own chain": cycles("chain"), "the barrier": of("barrier")},
            )


H100 = Device("cuda", "sm_90", int(of("on_chip")), int(of("sms")))


def planned(cell: Cell, precision: str) -> tuple[str, Step]:
    """Returns the kind of plan that the layer makes for a cell on an H100, and one step of it."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    plan = choose(cell.hidden_size, cell.batch, dtype, H100, tf32=precision == "tf32")
    hidden, width, sms = cell.hidden_size, BYTES[precision], of("sms")
    programs = plan.members * math.ceil(cell.batch / plan.block_b)
    waves = math.ceil(programs / sms)
    rows, columns = plan.block_b, plan.tiles * min(plan.block_n, hidden)
    resources = {
        "multiply-adds": 2 * rows * columns * hidden * sms / of(precision),
        "device memory": rows_in_and_out(cell.batch, hidden, width) / waves,
    }
    if plan.kind != "streamed":
        resources["shared memory"] = from_shared(rows, hidden, columns, precision)
    if plan.kind != "resident":
        read = width * rows * hidden
        if plan.kind == "streamed":
            read = width * hidden * (rows * plan.tiles + columns)
        together = min(programs, sms)
        resources["L2"] = max(read * together / of("l2"), read / per_second("l2_port"))
    latency = {"the step's own chain": cycles("chain")}
    if plan.members > 1:
        latency["the barrier"] = of("barrier")
    return plan.kind, Step(resources, latency, waves)


PlanKind = Callable[[int, int, str], Iterator[Step]]
"""Yields a step of every plan of one kind, from a batch, a hidden size and a precision."""
PLAN_KINDS: tuple[PlanKind, ...] = (resident, streamed, cooperative)


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


@dataclass(frozen=True)
class Recurrence:
    """One pass through time with the fastest plan for it."""

    kind: str
    first: Step
    seconds: float


def recurrence(cell: Cell, precision: str) -> Recurrence:
    """Returns the recurrence of a cell with the fastest plan."""
    found = []
    for kind in PLAN_KINDS:
        steps = {b: [*kind(b, cell.hidden_size, precision)] for b in set(alive(cell))}
        if all(steps.values()):
            best = {b: min(some, key=lambda step: step.seconds) for b, some in steps.items()}
            seconds = sum(best[b].seconds for b in alive(cell))
            found.append(Recurrence(kind.__name__, best[cell.batch], seconds))
    return min(found, key=lambda one: one.seconds)


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


def passes(cell: Cell) -> int:
    """Returns how often a cell goes through time."""
    return 2 if cell.mode == TRAINING else 1


def graph_seconds(cell: Cell, precision: str) -> float:
    """Returns the predicted seconds of one replay of a CUDA graph."""
    through_time = passes(cell) * recurrence(cell, precision).seconds
    return through_time + products(cell, precision) + KERNELS[cell.mode] * of("node")


def stepwise_seconds(cell: Cell, precision: str) -> float:
    """Returns the predicted seconds of an implementation with two kernels for each step, a product
    and the nonlinearity: cuDNN's standard algorithm and FlashRNN's alternating kernels."""
    hidden, width = cell.hidden_size, BYTES[precision]
    seconds = 0.0
    for batch in alive(cell):
        weight = hidden**2 * math.ceil(batch / PRODUCT_TILE)
        states = batch * hidden * math.ceil(hidden / PRODUCT_TILE)
        work = (
            2 * padded(batch, precision) * hidden**2 / of(precision),
            width * (weight + states) / of("l2"),
        )
        seconds += max(work) + cycles("chain") + 2 * of("node")
    return passes(cell) * seconds + products(cell, precision)
