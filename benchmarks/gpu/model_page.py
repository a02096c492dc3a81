"""Writes the page of the GPU model: `make gpu-model`, or `python -m benchmarks.gpu.model_page`.

The kernels of all plans are compiled, without a GPU. `--record` replaces what was read off them in
`benchmarks/results/gpu_model.json`, and the page.
"""

import dataclasses
import itertools
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from benchmarks.gpu.grid import CELLS
from benchmarks.gpu.h100 import ASSUMED, LATENCIES, RATES, Constant
from benchmarks.gpu.launches import launched
from benchmarks.gpu.lint.cases import Case
from benchmarks.gpu.model import (
    BY_NAME,
    Record,
    Step,
    batch_sizes_of,
    case_of,
    facts_of,
    key_of,
    plan_of,
)
from benchmarks.gpu.rivals import SMALL_H, Loop, algorithm, loop
from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, MODES, Cell
from benchmarks.harness.paths import GPU_MODEL, RESULTS
from namernn_fast.bench.tables import markdown

RAW = RESULTS / "gpu_model.json"
KERNELS = ("forward", "backward")
SHAPES = [cell for cell in CELLS if cell.mode == FORWARD]
_CLEARLY = 0.8  # of our step: a loop that takes less is clearly faster
_CONFLICTS = 1.5  # times the rows of banks without conflicts

TEXT = """\
# A model of the layer on an H100

**Nothing on this page has been measured on a GPU.** It is written by `make gpu-model RECORD=1` from
the machine code that Triton {triton} emits for an H100 and from the constants below, of which
{assumed} are assumed. It says where time goes and which plan to doubt first; `make bench-gpu` on a
card says what is true.

## The model

1. Each cell of `benchmarks/gpu/grid.py` has the plan that `choose` in `namernn_fast/gpu/plan.py`
   makes for an H100, and its forward and backward kernels are compiled and disassembled.
2. A step of the loop over time is counted as `make gpu-lint` counts it: instructions, shuffles,
   exponentials, products and bytes.
3. The rows of banks that an access to shared memory takes, and the sectors of one to global memory,
   are computed from the addresses of the 32 lanes of a warp, as far as the code tells them.
4. Each count, times the warps of all programs on the busiest multiprocessor (SM), over the rate of
   its unit is a bound: no step can take less.
5. L2 and device memory give such a bound for all SMs together.
6. The latency of a step is that of one simulated warp, which issues in order and waits for what it
   reads, for barriers, for fences and for atomics; what is loaded a step ahead costs it nothing.
7. Programs that share out hidden units exchange states in this latency too: a fence, an arrival at
   a counter, a look at it, and a load of the states from L2.
8. A step takes the largest of all bounds, and its name is in the column `bound by`.
9. Programs that do not fit all SMs at the same time, by registers, shared memory and warps, take
   turns.
10. A CUDA graph takes all steps, the products around them at the peak rate, and a gap for each
    kernel that the call launches.

## Constants

{rates}

Latencies:

{latencies}

## Predictions

Times of a step and of a replay of a CUDA graph in microseconds; a step is that of all sequences of
the batch, the first one where names end. `members x tiles of B x N x K`: programs that share out
hidden units, blocks of units of each, and the block of a program in sequences, units, and units
that are summed over. Names have the lengths of the embedded sample.

{predictions}
## Bank conflicts

In these kernels the lanes of a warp read different rows of the same banks of shared memory, and
wait for each other. `rows` and `at least` are cycles of shared memory for a step of one program,
with and without such conflicts; the last two columns are the step of all sequences without them.

{conflicts}

## What others run

PyTorch chooses the algorithm of cuDNN for `nn.RNN` in `get_algo` of
`aten/src/ATen/native/cudnn/RNN.cpp`, here as at commit 00fc08aa, the newest version at hand. For
tanh and relu, for an input that is not packed, and in every dtype but float64, that is
`{small_h}` up to H = 384 in the forward pass and up to H = 256 in the
backward pass. Else it is, in float16 alone, a persistent kernel for some sizes, and the standard
algorithm in all other cases. In the grid:

{rivals}

**No ratio to PyTorch is given: no figure of either algorithm on an H100 was found.** The pull
request that added the algorithm for small hidden sizes (pytorch/pytorch#62143) links figures of its
author (github.com/xwang233/code-snippet, cudnn-rnn-bench-62143), of a card that is not named. All
those of one layer with tanh in float32, forward, called from Python:

{published}

A step of the model above takes {ours} µs at H = 128 and B = 16 in float32. So what small layers
race against is no loop of launches but a persistent kernel, whose steps were of this order in 2021,
on a card older than an H100. From H = 264 on it took about as long as the standard algorithm.

- **FlashRNN** (arXiv 2412.07752) reports up to 50 times the speed of a plain PyTorch loop, which is
  not cuDNN; its README has its fused kernels 2 to 5 times as fast as its alternating ones, which
  run two kernels a step. No figure of its paper for `elman` was found.
- **Persistent RNNs** (Diamos et al., 2016) sustained 2.8 TFLOP/s, 45% of a Titan X's peak, on 4
  sequences, about 30 times as fast as products step by step.

## Would a loop of library calls be faster where H x B is large?

A step can be a product of torch and a pointwise kernel instead (`namernn_fast/gpu/stepwise.py`),
in a loop that a CUDA graph holds. Its least time is the product at the peak of the datasheet, or
at the rate at which L2 feeds tiles of 128 x 128 values, the pointwise kernel at the rate of
memory, and two gaps of a graph: no library reaches that. `mended` is our step without bank
conflicts; `tie` is the gap between nodes with which the loop would take as long as our mended
step, if the rest of it took no more than the least. `chosen` says where the layer takes the loop
for dense rows: always, or while a graph is captured, since an eager call waits for the host's
launches where steps are short. With TF32 it does so where torch's own products may be rounded to
TF32 too.

{loops}

**What follows** for the forward step, where {clearly:g} of ours or less is clearly faster:

{verdict}

## What the model leaves out

- Warps wait for each other at barriers: between two of them the slowest unit counts, so that a step
  takes the sum of several largest bounds and not the largest sum.
- Bank conflicts lengthen the latency too; here they take the time of the unit alone.
- Members arrive at a counter one after the other, and a fence waits for the stores of all warps.
- Global memory counts for the sequences of a block that exist, but in streamed plans as if all did;
  where the code does not tell the addresses, as if no two lanes read the same place.
- Integer arithmetic, conversions and predicates have no rate of their own.
- Queues of loads and of shared memory are never full, and instructions are always in their cache.
- Whether rows come from L2 or from device memory: all come from device memory once.
- The fill of a kernel's pipeline, its prologue and its epilogue, and the load of weights.
- What two kernels of a graph have at the same time, and the host, which an eager call waits for.
- The kernel for padded and packed rows: a packed cell has the kernel of dense rows, and the upload
  of its table is no kernel here.
- The clock, which falls under load.
"""

# (steps, batch, input size), hidden size: milliseconds before and after, as the author gives them.
_PUBLISHED = (
    ((1406, 34, 120), 120, 12.6, 1.1),
    ((1125, 44, 40), 160, 11.0, 1.6),
    ((2058, 62, 16), 168, 21.5, 3.4),
    ((4600, 16, 24), 264, 42.8, 43.6),
    ((4720, 4, 352), 288, 32.2, 27.9),
    ((3047, 6, 104), 296, 20.5, 21.0),
    ((4814, 6, 160), 360, 44.1, 49.7),
)


def microseconds(seconds: float) -> str:
    """Returns a duration in microseconds."""
    return f"{1e6 * seconds:.2f}" if seconds < 1e-5 else f"{1e6 * seconds:.1f}"


def sizes_of(cell: Cell) -> str:
    """Returns the sizes of a cell without its batch."""
    return f"({cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'})"


def table(record: Record, precision: str) -> str:
    """Returns a line for each cell in one precision."""
    heads = ["(D, H, T)", "B", "plan", "members x tiles of B x N x K"]
    heads += [part for name in KERNELS for part in (f"{name}: step", "bound by")]
    heads += [part for mode in MODES for part in (f"{mode}: graph", "kernels")]
    lines = [heads]
    for cell in SHAPES:
        plan = plan_of(cell, precision)
        blocks = f"{plan.block_b} x {plan.block_n} x {plan.block_k}"
        line = [sizes_of(cell), str(cell.batch), plan.kind]
        line.append(f"{plan.members} x {plan.tiles} of {blocks}")
        for kernel in KERNELS:
            found = record.step(cell, precision, kernel)
            line += [microseconds(found.seconds), found.bound]
        for mode in MODES:
            same = dataclasses.replace(cell, mode=mode)
            line.append(microseconds(record.graph_seconds(same, precision)))
            line.append(str(len(record.kernels(same, precision))))
        lines.append(line)
    return markdown(lines)


def bounds(record: Record, precision: str) -> str:
    """Says what binds the steps of all cells, and how many of them."""
    parts = []
    for kernel in KERNELS:
        found = Counter(record.step(cell, precision, kernel).bound for cell in SHAPES)
        parts.append(f"{kernel}: " + ", ".join(f"{b} {n}" for b, n in found.most_common()))
    return "; ".join(parts)


def constants(of: dict[str, Constant]) -> str:
    """Returns a table of constants."""
    lines = [["constant", "value", "unit", "source"]]
    for constant in of.values():
        lines.append([constant.meaning, f"{constant.value:.4g}", constant.unit, constant.source])
    return markdown(lines)


def rivals() -> str:
    """Returns how many cells run each algorithm of cuDNN."""
    lines = [["(D, H, T)", *(f"cuDNN {kernel}" for kernel in KERNELS)]]
    for cell in SHAPES:
        line = [sizes_of(cell), *(algorithm(cell, kernel) for kernel in KERNELS)]
        if line not in lines:
            lines.append(line)
    return markdown(lines)


def published() -> str:
    """Returns the published figures of the algorithm for small hidden sizes."""
    lines = [["(T, B, D)", "H", "before, ms", f"with {SMALL_H}, ms", "a step, µs"]]
    for sizes, hidden, before, after in _PUBLISHED:
        a_step = microseconds(1e-3 * after / sizes[0])
        lines.append([str(sizes), str(hidden), str(before), str(after), a_step])
    return markdown(lines)


def streamed(precision: str) -> list[Cell]:
    """Returns the cells whose plan streams weight_hh."""
    return [cell for cell in SHAPES if plan_of(cell, precision).kind == "streamed"]


def loops(record: Record) -> str:
    """Returns the forward step of streamed plans beside that of a loop of library calls."""
    heads = ["(D, H, T)", "B", "precision", "our step", "mended", "bound by"]
    heads += ["product", "pointwise", "loop", "loop / ours", "loop / mended", "tie", "chosen"]
    lines = [heads]
    for precision in BY_NAME:
        for cell in streamed(precision):
            ours, mended, least = _sides(record, cell, precision)
            line = [sizes_of(cell), str(cell.batch), precision]
            line += [microseconds(ours.seconds), microseconds(mended.seconds), mended.bound]
            line += map(microseconds, (least.product, least.pointwise, least.seconds))
            line += [f"{least.seconds / one.seconds:.2f}" for one in (ours, mended)]
            line.append(microseconds(max(0.0, least.gap_of_a_tie(mended.seconds))))
            line.append(_chosen(cell, precision))
            lines.append(line)
    return markdown(lines)


def _chosen(cell: Cell, precision: str) -> str:
    """Returns when torch multiplies the steps of a cell: `always`, `captured` or `no`."""
    if BY_NAME[precision].dtype != torch.float32:
        return "no"
    plan, sizes = plan_of(cell, precision), (cell.hidden_size, cell.batch)
    if plan.runs_stepwise(*sizes, is_captured=False):
        return "always"
    return "captured" if plan.runs_stepwise(*sizes, is_captured=True) else "no"


def _sides(record: Record, cell: Cell, precision: str) -> tuple[Step, Step, Loop]:
    """Returns our forward step, that without bank conflicts, and that of a loop."""
    ours = record.step(cell, precision, "forward")
    mended = record.step(cell, precision, "forward", conflicts=False)
    return ours, mended, loop(cell, precision)


def verdict(record: Record) -> str:
    """Says for which cells the least time of a loop is clearly below our step."""
    headings = (
        "The loop is faster: even without bank conflicts our step takes clearly longer "
        "(in brackets the loop over the mended step)",
        "Bank conflicts are to be mended first: the loop is clearly faster than our step as it is, "
        "and not than the mended one (the loop over our step)",
        "The loop promises nothing: its least time is not clearly below ours",
    )
    found: list[list[str]] = [[], [], []]
    for precision in BY_NAME:
        named: list[list[str]] = [[], [], []]
        for cell in streamed(precision):
            ours, mended, least = _sides(record, cell, precision)
            clearly, still = (least.seconds < _CLEARLY * one.seconds for one in (ours, mended))
            ratio = least.seconds / (mended if still else ours).seconds
            named[0 if still else 1 if clearly else 2].append(
                f"{sizes_of(cell)} B={cell.batch} ({ratio:.2f})"
            )
        for cells, of in zip(named, found, strict=True):
            of += [f"  - {precision}: {', '.join(cells)}"] if cells else []
    lines = []
    for heading, of in zip(headings, found, strict=True):
        lines += [f"- {heading}:", *(of or ["  - no cell"])]
    return "\n".join(lines)


def conflicts(record: Record) -> str:
    """Returns the kernels with bank conflicts, each for its first cell."""
    heads = ["precision", "(D, H, T)", "B", "plan", "kernel", "rows", "at least"]
    lines = [[*heads, "our step", "without", "bound by"]]
    seen = set()
    for precision, cell, kernel in itertools.product(BY_NAME, SHAPES, KERNELS):
        case = case_of(cell, precision, kernel)
        facts = record.facts[case.name]
        if case.name in seen or facts.bank_rows < _CONFLICTS * facts.least_bank_rows:
            continue
        seen.add(case.name)
        ours = record.step(cell, precision, kernel)
        mended = record.step(cell, precision, kernel, conflicts=False)
        line = [precision, sizes_of(cell), str(cell.batch), case.build.plan.kind, kernel]
        line += [str(facts.bank_rows), str(facts.least_bank_rows)]
        line += [microseconds(ours.seconds), microseconds(mended.seconds), mended.bound]
        lines.append(line)
    return markdown(lines)


def _example(record: Record) -> float:
    """Returns the seconds of a step of about the sizes of published figures."""
    (cell,) = (cell for cell in SHAPES if (cell.hidden_size, cell.batch) == (128, 16))
    return record.step(cell, "float32", "forward").seconds


def page(record: Record) -> str:
    """Returns the whole page."""
    predictions = ""
    for precision in BY_NAME:
        predictions += f"### {precision}\n\nSteps by bound: {bounds(record, precision)}.\n\n"
        predictions += f"{table(record, precision)}\n\n"
    assumed = sum(c.source.startswith(ASSUMED) for of in (RATES, LATENCIES) for c in of.values())
    return TEXT.format(
        triton=record.triton,
        assumed=assumed,
        rates=constants(RATES),
        latencies=constants(LATENCIES),
        predictions=predictions,
        conflicts=conflicts(record),
        small_h=SMALL_H,
        rivals=rivals(),
        published=published(),
        ours=microseconds(_example(record)),
        clearly=_CLEARLY,
        loops=loops(record),
        verdict=verdict(record),
    )


def load() -> Record:
    """Returns what was recorded."""
    return Record.of(json.loads(RAW.read_text(encoding="utf-8")))


def make() -> Record:
    """Compiles the kernels of all plans, and traces the calls of all cells."""
    cases: dict[str, Case] = {}
    for precision in BY_NAME:
        for cell in SHAPES:
            for kernel in KERNELS:
                case = case_of(cell, precision, kernel)
                cases.setdefault(case.name, case)
    with ProcessPoolExecutor() as pool:
        facts = dict(zip(cases, pool.map(facts_of, cases.values()), strict=True))
    launches = {
        key_of(cell, name): launched(cell, precision, batch_sizes_of(cell))
        for name, precision in BY_NAME.items()
        for cell in CELLS
    }
    return Record(triton.__version__, facts, launches)


def main() -> None:
    options = pages.parse(pages.parser(__doc__))
    record = make()
    folder = pages.folder_of(options.record)
    raw = folder / RAW.name
    raw.write_text(json.dumps(record.document()) + "\n", encoding="utf-8")
    text = page(record)
    print(text)
    path = GPU_MODEL if options.record else folder / GPU_MODEL.name
    path.write_text(text, encoding="utf-8")
    pages.announce(raw, path)


if __name__ == "__main__":
    main()
