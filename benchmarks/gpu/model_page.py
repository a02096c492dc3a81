"""Writes the page of the GPU model: `make gpu-model`, or `python -m benchmarks.gpu.model_page`."""

import dataclasses
import statistics

from benchmarks.gpu.grid import CELLS
from benchmarks.gpu.model import (
    BYTES,
    CONSTANTS,
    KERNELS,
    PRODUCT_TILE,
    READ_ROWS,
    TILE_COLUMNS,
    TILE_ROWS,
    graph_seconds,
    of,
    planned,
    recurrence,
    stepwise_seconds,
)
from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, MODES, TRAINING
from benchmarks.harness.paths import GPU_MODEL
from benchmarks.harness.tables import markdown, ratio


def microseconds(seconds: float) -> str:
    """Returns a duration in microseconds."""
    return f"{1e6 * seconds:.1f}"


def table(precision: str) -> str:
    """Returns a line for each cell in one precision."""
    lines = [["(D, H, T)", "B", "fastest", "a step", "bound by", "plan", "its step"]]
    for mode in MODES:
        lines[0] += [f"{mode}: graph", "two kernels a step", "over graph"]
    for cell in CELLS:
        if cell.mode != FORWARD:
            continue
        found = recurrence(cell, precision)
        sizes = f"({cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'})"
        line = [sizes, str(cell.batch)]
        line += [found.kind, microseconds(found.first.seconds), found.first.bound]
        kind, step = planned(cell, precision)
        line += [kind, microseconds(step.seconds)]
        for mode in MODES:
            same = dataclasses.replace(cell, mode=mode)
            graph, stepwise = graph_seconds(same, precision), stepwise_seconds(same, precision)
            line += map(microseconds, (graph, stepwise))
            line.append(ratio(stepwise / graph))
        lines.append(line)
    return markdown(lines)


def bounds(precision: str) -> str:
    """Says how many cells are fastest with each kind of plan, and what bounds them."""
    counts: dict[str, dict[str, int]] = {}
    for cell in CELLS:
        if cell.mode == FORWARD:
            found = recurrence(cell, precision)
            by_bound = counts.setdefault(found.kind, {})
            by_bound[found.first.bound] = by_bound.get(found.first.bound, 0) + 1
    parts = []
    for kind, by_bound in counts.items():
        reasons = ", ".join(f"{bound} {count}" for bound, count in by_bound.items())
        parts.append(f"{kind} {sum(by_bound.values())} ({reasons})")
    return "; ".join(parts)


def means(precision: str) -> str:
    """Returns the mean and the worst ratio of each mode to two kernels a step."""
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

Written by `make gpu-model RECORD=1` from the constants below and the grid of
`benchmarks/gpu/grid.py`. **Nothing here has been measured on a GPU.** These are floors, for
kernels that keep every unit at its datasheet's rate; what `make bench-gpu` measures will lie
above them.

## Constants

{constants}

## The model

T steps, B sequences, H hidden units, D input features, w bytes a value; times in microseconds.

A call is the projection of all rows, one product of 2·T·B·D·H operations, and then T steps, each
with a product of 2·B·H² operations that waits for the step before. Training has the steps once
more, backwards, and grad_weight_ih, grad_weight_hh and the bias as products over all rows at once:
these are not bound by latency, and cost what their operations or their bytes do. Within a step the
resources overlap, so the largest counts, and latencies are added. A multiprocessor has one program.
There are three kinds of plan, of which a cell takes the fastest:

- **resident**: one program for a block of sequences, weight_hh on chip, which must hold it: H²·w up
  to {on_chip} KiB, {largest}.
  A step costs its chain of dependent instructions, and for tensor cores H²·w bytes from shared
  memory for every {read_rows} rows and at least {tile_rows} rows of operations, however few the
  sequences. Without tensor cores multiply-adds bind it.
- **streamed**: weight_hh from L2 at every step, H²·w bytes for every block of sequences: read by
  one program for a block, or in tiles of up to {tile_columns} hidden units, which all programs
  share out and which cost a barrier of the grid a step. L2 binds it: the port of one
  multiprocessor while there are few tiles, all of L2 when there are many.
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
  persistent kernels, whose floor is that of the plans above; when PyTorch took them in, it chose
  them for half precision (pytorch/pytorch#11248, #43165), and it added others for small hidden
  sizes, 10 times as fast "in some shapes" (#62143). bfloat16 reaches cuDNN since its version 9.13
  (#164411); before, `nn.RNN` runs ATen's operators. `make bench-gpu` notes which it raced.
- **FlashRNN** (arXiv 2412.07752) reports up to 50 times the speed of a plain PyTorch loop, which is
  not cuDNN; its README has its fused kernels 2 to 5 times as fast as its alternating ones, which
  run two kernels a step. No figure of its paper for `elman` was found. Its fused kernels keep the
  recurrent matrix in registers and shared memory and synchronise the grid: they have the floor of
  the cooperative plan, without the projection, which they leave to the caller.
- **Persistent RNNs** (Diamos et al., 2016) sustained 2.8 TFLOP/s, 45% of a Titan X's peak, on 4
  sequences, about 30 times as fast as products step by step: what the cooperative plan is for.

## Predictions

`fastest` is the kind of plan that the model finds fastest, and the figures are its predictions.
`plan` is the kind of plan that `choose` in `namernn_fast/gpu/plan.py` makes for the layer, and
`its step` is what the model predicts for that plan, with its blocks. The step shown is the first,
with all sequences alive. Names have the lengths of the embedded sample. `over graph` compares the
model of two kernels a step with ours, both in a CUDA graph.
"""


def constants() -> str:
    """Returns the table of constants."""
    lines = [["constant", "value", "unit", "source"]]
    for constant in CONSTANTS.values():
        lines.append([constant.meaning, f"{constant.value:.4g}", constant.unit, constant.source])
    return markdown(lines)


def largest_resident(precision: str) -> str:
    """Names the largest hidden size of the grid whose weight_hh one program can hold."""
    sizes = {cell.hidden_size for cell in CELLS}
    fitting = max(h for h in sizes if BYTES[precision] * h**2 <= of("on_chip"))
    return f"H = {fitting} in {precision}"


def page() -> str:
    """Returns the whole page."""
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
            f"Cells by kind of plan and bound: {bounds(precision)}.\n",
            f"Geometric mean over two kernels a step: {means(precision)}.\n",
            f"{table(precision)}\n",
        ]
    return "\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__))
    text = page()
    print(text)
    path = GPU_MODEL if options.record else pages.folder_of(record=False) / GPU_MODEL.name
    path.write_text(text, encoding="utf-8")
    pages.announce(path)


if __name__ == "__main__":
    main()
