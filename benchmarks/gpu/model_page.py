"""Writes the page of the GPU model: `make gpu-model`, or `python -m benchmarks.gpu.model_page`."""

import dataclasses
import statistics
from collections import Counter

from benchmarks.gpu.grid import CELLS, PRECISIONS, Precision
from benchmarks.gpu.model import (
    CONSTANTS,
    PERSISTENT,
    PRODUCT_TILE,
    graph_seconds,
    kernels_of,
    rival_seconds,
    step,
)
from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, MODES, Cell
from benchmarks.harness.paths import GPU_MODEL
from benchmarks.harness.tables import markdown, ratio


def microseconds(seconds: float) -> str:
    """Returns a duration in microseconds."""
    return f"{1e6 * seconds:.1f}"


def over(cell: Cell, precision: Precision) -> float | None:
    """Returns the model of cuDNN over that of the layer, None where no ratio is known."""
    rival = rival_seconds(cell, precision)
    return None if rival is None else rival / graph_seconds(cell, precision)


def table(precision: Precision) -> str:
    """Returns a line for each cell in one precision."""
    lines = [["(D, H, T)", "B", "plan", "a step", "bound by", "a step back", "bound by"]]
    for mode in MODES:
        lines[0] += [f"{mode}: kernels", "graph", "cuDNN over it"]
    for cell in CELLS:
        if cell.mode != FORWARD:
            continue
        sizes = f"({cell.input_size}, {cell.hidden_size}, {cell.seq_len or 'names'})"
        line = [sizes, str(cell.batch)]
        for kernel in ("forward", "backward"):
            found = step(cell.hidden_size, cell.batch, precision, kernel)
            line += [found.kind] if kernel == "forward" else []
            line += [microseconds(found.seconds), found.bound]
        for mode in MODES:
            same = dataclasses.replace(cell, mode=mode)
            times = over(same, precision)
            line += [str(kernels_of(same, precision)), microseconds(graph_seconds(same, precision))]
            line.append("" if times is None else ratio(times))
        lines.append(line)
    return markdown(lines)


def bounds(precision: Precision) -> str:
    """Says how many cells there are of each kind of plan, and what bounds them."""
    counts: dict[str, Counter[str]] = {}
    for cell in CELLS:
        if cell.mode == FORWARD:
            found = step(cell.hidden_size, cell.batch, precision, "forward")
            counts.setdefault(found.kind, Counter())[found.bound] += 1
    parts = []
    for kind, by_bound in counts.items():
        reasons = ", ".join(f"{bound} {count}" for bound, count in by_bound.items())
        parts.append(f"{kind} {sum(by_bound.values())} ({reasons})")
    return "; ".join(parts)


def means(precision: Precision) -> str:
    """Returns the mean and the worst ratio of each mode to cuDNN, where one is known."""
    parts = []
    for mode in MODES:
        ratios = {cell: over(cell, precision) for cell in CELLS if cell.mode == mode}
        found = {cell: times for cell, times in ratios.items() if times is not None}
        worst = min(found, key=found.__getitem__)
        mean = statistics.geometric_mean(found.values())
        parts.append(
            f"{mode} {mean:.2f} over {len(found)} of {len(ratios)} cells, at worst "
            f"{found[worst]:.2f} in {worst}"
        )
    return "; ".join(parts)


TEXT = """\
# A model of the layer on an H100

Written by `make gpu-model RECORD=1` from the constants below, the grid of
`benchmarks/gpu/grid.py`, and what `make gpu-lint RECORD=1` counted in the kernels' machine code.
**Nothing here has been measured on a GPU.** These are estimates from below; what `make bench-gpu`
measures will lie above.

## Constants

{constants}

## The model

T steps, B sequences, H hidden units, D input features; times in microseconds.

A call is the projection of all rows, one product of 2·T·B·D·H operations, and then T steps.
Training has the steps once more, backwards, and grad_weight_ih, grad_weight_hh and the bias as
products over all rows at once, which cost what their operations or their bytes do.

The plan is the one that `choose` in `namernn_fast/gpu/plan.py` makes for the cell. A step takes
as long as the unit that it keeps busy for longest, or the chain of a warp if that is longer:

- **issue slots, float32, special functions, shuffles, tensor cores, shared memory, L2**: the
  instructions and bytes of a step, counted in the loop over time ([gpu_lint.md](gpu_lint.md)),
  times the warps of all programs that are on a multiprocessor at the same time, over the unit's
  rate.
- **the chain of a warp**: the cycles of a step in a simulation of the loop's instructions, one
  after the other, each waiting for its sources, with one latency for each unit. The wait for
  other programs is a part of it: stores, fence, arrival and look at the counter each take the
  latency of L2. All programs are taken to arrive at the same time.

Where there are more programs than the multiprocessors hold at once, by registers and shared
memory, they take turns. Masked lanes count, as do lanes that read the same bytes, and so does code
that runs in some steps alone.

Around it, a CUDA graph costs a gap for each kernel; the kernels of a call are counted by running
the host's code without values. A call from Python costs what its host needs, and the GPU waits
wherever it has less to do: that is no property of the GPU, so it is not in the model.

## What others do

- **cuDNN**: PyTorch has it run a persistent kernel for tanh and relu up to H = {forward} forward
  and H = {backward} backward (`PERSIST_STATIC_SMALL_H`). No figures of its speed were found, so
  no ratio is given there. For larger sizes `cuDNN over it` is the ratio of a model of cuDNN's
  standard algorithm to that of the layer, both in a CUDA graph: two kernels for each step, a
  product and a nonlinearity, in tiles of {tile} x {tile} values from L2, with the gap between the
  nodes of a graph. It is no measurement, and leaves out every latency within its kernels, which
  the model of the layer has: it errs in cuDNN's favour. In half precision PyTorch has cuDNN run
  other persistent kernels for some batches. bfloat16 reaches cuDNN since its version 9.13
  (pytorch/pytorch#164411); before, `nn.RNN` runs ATen's operators. `make bench-gpu` notes which
  it raced.
- **FlashRNN** (arXiv 2412.07752) reports up to 50 times the speed of a plain PyTorch loop, which
  is not cuDNN; its README has its fused kernels 2 to 5 times as fast as its alternating ones,
  which run two kernels a step. No figure of its paper for `elman` was found.
- **Persistent RNNs** (Diamos et al., 2016) sustained 2.8 TFLOP/s, 45% of a Titan X's peak, on 4
  sequences, about 30 times as fast as products step by step.

## Predictions

`a step` is a step of the forward pass, `a step back` one of the backward pass, with all sequences
alive. Names have the lengths of the embedded sample.
"""


def constants() -> str:
    """Returns the table of constants."""
    lines = [["constant", "value", "unit", "source"]]
    for constant in CONSTANTS.values():
        lines.append([constant.meaning, f"{constant.value:.4g}", constant.unit, constant.source])
    return markdown(lines)


def page() -> str:
    """Returns the whole page."""
    parts = [TEXT.format(constants=constants(), tile=PRODUCT_TILE, **PERSISTENT)]
    for precision in PRECISIONS:
        parts += [
            f"### {precision.name}\n",
            f"Cells by kind of plan and what bounds the forward pass: {bounds(precision)}.\n",
            f"Geometric mean of cuDNN over the layer: {means(precision)}.\n",
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
