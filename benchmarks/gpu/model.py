"""A roofline of the layer on an H100, on paper: `python -m benchmarks.gpu_model [--write]`.

Writes `gpu_model.md` beside it. Nothing in it is measured: every figure follows from `CONSTANTS`.
The legend is that of the kernels: T steps, B sequences, H hidden units, D input features; w is the
bytes of a value.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch

from benchmarks.gpu.cudnn import CELLS
from benchmarks.harness.grid import FORWARD, MODES, TRAINING, Cell
from benchmarks.harness.paths import GPU_MODEL
from benchmarks.harness.tables import markdown, ratio
from namernn_fast.gpu.device import Device
from namernn_fast.gpu.rule import choose
from namernn_fast.names import encode_names
from namernn_fast.names.data import embedded_sample

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
# Of the tiles in which programs share out a step.
TILE_COLUMNS = (16, 32, 64, 128)
# The tiles of a product that runs by itself, for what it reads of L2.
PRODUCT_TILE = 128
# Projection and recurrence; then the recurrence backwards, two products and the bias.
KERNELS = {FORWARD: 2, TRAINING: 6}


def of(name: str) -> float:
    return CONSTANTS[name].value


def cycles(name: str) -> float:
    """Seconds of so many cycles."""
    return of(name) / of("clock")


def per_second(name: str) -> float:
    """Of one multiprocessor, from its rate per cycle."""
    return of(name) * of("clock")


def padded(rows: int, precision: str) -> int:
    """The rows that are computed; float32 has no tensor cores, so no tiles to fill."""
    return rows if precision == "float32" else TILE_ROWS * math.ceil(rows / TILE_ROWS)


def blocks(precision: str) -> tuple[int, ...]:
    """How many sequences a program may have."""
    return (1, 16, 32, 64, 128) if precision == "float32" else (16, 32, 64, 128)


def from_shared(rows: int, hidden: int, columns: int, precision: str) -> float:
    """Seconds of a program's reads: tensor cores take weights from shared memory, and float32 has
    them in registers and takes the states from there."""
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
    """Seconds in which a step's projected rows come from device memory and its states go there."""
    return 2 * batch * hidden * width / of("hbm")


def resident(batch: int, hidden: int, precision: str) -> Iterator[Step]:
    """One program for a block of sequences, weight_hh on chip."""
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
    """weight_hh from L2 at every step, by one program for a block of sequences, or in tiles that
    all programs share out, with one barrier of the grid a step."""
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
    """weight_hh cut over the programs of a group, one barrier of the grid a step; each group has
    its share of the sequences. A program reads all states of its group from L2."""
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


def ruled(cell: Cell, precision: str) -> tuple[str, Step]:
    """The regime that the kernels' own rule takes on this device, and a step of it."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    config = choose(cell.hidden_size, cell.batch, dtype, H100, tf32=precision == "tf32")
    hidden, width, sms = cell.hidden_size, BYTES[precision], of("sms")
    programs = config.members * math.ceil(cell.batch / config.block_b)
    waves = math.ceil(programs / sms)
    rows, columns = config.block_b, config.tiles * min(config.block_n, hidden)
    resources = {
        "multiply-adds": 2 * rows * columns * hidden * sms / of(precision),
        "device memory": rows_in_and_out(cell.batch, hidden, width) / waves,
    }
    if config.regime != "streamed":
        resources["shared memory"] = from_shared(rows, hidden, columns, precision)
    if config.regime != "resident":
        read = width * rows * hidden
        if config.regime == "streamed":
            read = width * hidden * (rows * config.tiles + columns)
        together = min(programs, sms)
        resources["L2"] = max(read * together / of("l2"), read / per_second("l2_port"))
    latency = {"the step's own chain": cycles("chain")}
    if config.members > 1:
        latency["the barrier"] = of("barrier")
    return config.regime, Step(resources, latency, waves)


Regime = Callable[[int, int, str], Iterator[Step]]
REGIMES: tuple[Regime, ...] = (resident, streamed, cooperative)


@cache
def lengths() -> tuple[int, ...]:
    """Of the names of the embedded sample, which every checkout has."""
    return tuple(encode_names([name for name, _ in embedded_sample().rows]).lengths.tolist())


def alive(cell: Cell) -> list[int]:
    """How many sequences there are at each step."""
    if cell.seq_len is not None:
        return [cell.batch] * cell.seq_len
    known = lengths()
    shares = (sum(n > t for n in known) / len(known) for t in range(max(known)))
    return [math.ceil(cell.batch * share) for share in shares]


@dataclass(frozen=True)
class Recurrence:
    """One pass through time in the regime that is fastest for it."""

    regime: str
    first: Step
    seconds: float


def recurrence(cell: Cell, precision: str) -> Recurrence:
    found = []
    for regime in REGIMES:
        steps = {b: [*regime(b, cell.hidden_size, precision)] for b in set(alive(cell))}
        if all(steps.values()):
            best = {b: min(some, key=lambda step: step.seconds) for b, some in steps.items()}
            seconds = sum(best[b].seconds for b in alive(cell))
            found.append(Recurrence(regime.__name__, best[cell.batch], seconds))
    return min(found, key=lambda one: one.seconds)


def product(rows: int, inner: int, columns: int, precision: str) -> float:
    """Seconds of a matrix product from and to device memory."""
    values = rows * inner + inner * columns + rows * columns
    return max(2 * rows * inner * columns / of(precision), BYTES[precision] * values / of("hbm"))


def products(cell: Cell, precision: str) -> float:
    """Seconds of what is parallel in time: the projection, and in training grad_weight_ih,
    grad_weight_hh and the sum for the biases."""
    rows, size, hidden = sum(alive(cell)), cell.input_size, cell.hidden_size
    seconds = product(rows, size, hidden, precision)
    if cell.mode == TRAINING:
        seconds += product(hidden, rows, size, precision) + product(hidden, rows, hidden, precision)
        seconds += BYTES[precision] * rows * hidden / of("hbm")
    return seconds


def passes(cell: Cell) -> int:
    return 2 if cell.mode == TRAINING else 1


def graph_seconds(cell: Cell, precision: str) -> float:
    """Predicted for one replay of a CUDA graph."""
    through_time = passes(cell) * recurrence(cell, precision).seconds
    return through_time + products(cell, precision) + KERNELS[cell.mode] * of("node")


def stepwise_seconds(cell: Cell, precision: str) -> float:
    """Predicted for an implementation with two kernels a step, a product and the nonlinearity:
    the model of cuDNN's standard algorithm and of FlashRNN's alternating kernels."""
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


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def table(precision: str) -> str:
    lines = [["(D, H, T)", "B", "fastest", "a step", "bound by", "rule", "its step"]]
    for mode in MODES:
        lines[0] += [f"{mode}: graph", "two kernels a step", "over graph"]
    for cell in CELLS:
        if cell.mode != FORWARD:
            continue
        found = recurrence(cell, precision)
        sizes = f"({cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'})"
        line = [sizes, str(cell.batch)]
        line += [found.regime, microseconds(found.first.seconds), found.first.bound]
        regime, step = ruled(cell, precision)
        line += [regime, microseconds(step.seconds)]
        for mode in MODES:
            same = dataclasses.replace(cell, mode=mode)
            graph, stepwise = graph_seconds(same, precision), stepwise_seconds(same, precision)
            line += map(microseconds, (graph, stepwise))
            line.append(ratio(stepwise / graph))
        lines.append(line)
    return markdown(lines)


def bounds(precision: str) -> str:
    """How many cells are in which regime, and what bounds them there."""
    counts: dict[str, dict[str, int]] = {}
    for cell in CELLS:
        if cell.mode == FORWARD:
            found = recurrence(cell, precision)
            by_bound = counts.setdefault(found.regime, {})
            by_bound[found.first.bound] = by_bound.get(found.first.bound, 0) + 1
    parts = []
    for regime, by_bound in counts.items():
        reasons = ", ".join(f"{bound} {count}" for bound, count in by_bound.items())
        parts.append(f"{regime} {sum(by_bound.values())} ({reasons})")
    return "; ".join(parts)


def means(precision: str) -> str:
    parts = []
    for mode in MODES:
        found = {
            cell: stepwise_seconds(cell, precision) / graph_seconds(cell, precision)
            for cell in CELLS
            if cell.mode == mode
        }
        worst = min(found, key=found.__getitem__)
        mean = statistics.geometric_mean(found.values())
        parts.append(f"{mode} {mean:.2f}, at worst {found[worst]:.2f} in {worst}")
    return "; ".join(parts)


TEXT = """\
# A roofline of the layer on an H100

Written by `make gpu-model` from the constants below and the grid of `benchmarks/gpu.py`. **Nothing
here has been measured on a GPU.** These are floors, for kernels that keep every unit at its
datasheet's rate; what `make bench-gpu` measures will lie above them.

## Constants

{constants}

## The model

T steps, B sequences, H hidden units, D input features, w bytes a value; times in microseconds.

A call is the projection of all rows, one product of 2·T·B·D·H operations, and then T steps, each
with a product of 2·B·H² operations that waits for the step before. Training has the steps once
more, backwards, and grad_weight_ih, grad_weight_hh and the bias as products over all rows at once:
these are not bound by latency, and cost what their operations or their bytes do. Within a step the
resources overlap, so the largest counts, and latencies are added. A multiprocessor has one program.
There are three regimes, of which a cell takes the fastest:

- **resident**: one program for a block of sequences, weight_hh on chip, which must hold it: H²·w up
  to {on_chip} KiB, {largest}.
  A step costs its chain of dependent instructions, and for tensor cores H²·w bytes from shared
  memory for every {read_rows} rows and at least {tile_rows} rows of operations, however few the
  sequences. Without tensor cores multiply-adds bind it.
- **streamed**: the same with H²·w bytes from L2 for every block and step, or in tiles of up to
  {tile_columns} hidden units, which all programs share out and which cost a barrier of the grid a
  step. L2 binds it: the port of one multiprocessor while there are few tiles, all of L2 when there
  are many.
- **cooperative**: weight_hh cut over the programs of a group, each with its part on chip. Every
  program reads the states of its group from L2, B·H·w bytes, and waits at one barrier of the grid
  a step. The barrier binds it for few sequences and makes T times {barrier} µs its floor; for many
  it is L2, for all programs read all states, where the tiles of a product read each value a few
  times only, or, in float32, the multiply-adds.

Around it, a CUDA graph costs a gap for each kernel: {forward_kernels} forward, {training_kernels}
in training. A call from Python costs what its host needs, and the GPU waits wherever it has less to
do: that is no property of the GPU, so it is not in the model.

## What others do

- **cuDNN** has no published figures for a vanilla RNN on an H100 that were found. The column `two
  kernels a step` is a model of what its standard algorithm must do: a product and a nonlinearity
  for each step, with the chain of one step, tiles of {product_tile} x {product_tile} values from
  L2, and the gap of a graph's nodes between kernels. It is no measurement. cuDNN also has
  persistent kernels, whose floor is that of the regimes above; when PyTorch took them in, it chose
  them for half precision (pytorch/pytorch#11248, #43165), and it added others for small hidden
  sizes, 10 times as fast "in some shapes" (#62143). bfloat16 reaches cuDNN since its version 9.13
  (#164411); before, `nn.RNN` runs ATen's operators. `make bench-gpu` notes which it raced.
- **FlashRNN** (arXiv 2412.07752) reports up to 50 times the speed of a plain PyTorch loop, which is
  not cuDNN; its README has its fused kernels 2 to 5 times as fast as its alternating ones, which
  run two kernels a step. No figure of its paper for `elman` was found. Its fused kernels keep the
  recurrent matrix in registers and shared memory and synchronise the grid: they have the floor of
  the cooperative regime, without the projection, which they leave to the caller.
- **Persistent RNNs** (Diamos et al., 2016) sustained 2.8 TFLOP/s, 45% of a Titan X's peak, on 4
  sequences, about 30 times as fast as products step by step: what the cooperative regime is for.

## Predictions

`fastest` is the model's regime, and all figures are its, but for `rule`, which is what `choose` in
`namernn_fast/gpu/rule.py` takes for that layer, and `its step`: what the model says of that
configuration, with the blocks that it has. A step is the first, with all sequences alive. Names
have the lengths of the embedded sample.
`over graph` compares the model of two kernels a step with ours, both in a CUDA graph.
"""


def constants() -> str:
    lines = [["constant", "value", "unit", "source"]]
    for constant in CONSTANTS.values():
        lines.append([constant.meaning, f"{constant.value:.4g}", constant.unit, constant.source])
    return markdown(lines)


def largest_resident(precision: str) -> str:
    """The largest hidden size of the grid whose weight_hh one program can hold, in words."""
    sizes = {cell.hidden_size for cell in CELLS}
    fitting = max(h for h in sizes if BYTES[precision] * h**2 <= of("on_chip"))
    return f"H = {fitting} in {precision}"


def page() -> str:
    parts = [
        TEXT.format(
            constants=constants(),
            on_chip=int(of("on_chip")) // 1024,
            largest=" and ".join(largest_resident(precision) for precision in BYTES),
            read_rows=READ_ROWS,
            tile_rows=TILE_ROWS,
            tile_columns=max(TILE_COLUMNS),
            product_tile=PRODUCT_TILE,
            barrier=f"{1e6 * of('barrier'):g}",
            forward_kernels=KERNELS[FORWARD],
            training_kernels=KERNELS[TRAINING],
        )
    ]
    for precision in BYTES:
        parts += [
            f"### {precision}\n",
            f"Cells by regime and bound: {bounds(precision)}.\n",
            f"Geometric mean over two kernels a step: {means(precision)}.\n",
            f"{table(precision)}\n",
        ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into benchmarks/gpu_model.md")
    options = parser.parse_args()
    print(page())
    if options.write:
        GPU_MODEL.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
