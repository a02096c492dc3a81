"""Draws the unrolled sequence: one operator for all steps against several at every step.

`python -m tools.picture` writes docs/unrolled.png.
"""

from collections import Counter
from pathlib import Path

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch.profiler import profile

PICTURE = Path(__file__).parents[1] / "docs" / "unrolled.png"
STEPS = 4
SPACING = 2.4  # between two steps of the picture
INK, STATE, OPERATOR, FUSED = "#333333", "#dfe7f2", "#f3d9c9", "#d5e8d4"
# ATen operators that only make a view, or call another operator that is counted.
NO_WORK = {"select", "as_strided", "linear", "t", "transpose", "expand", "resolve_conj"}


def operators_of_a_step() -> list[str]:
    """Returns the ATen operators that `nn.RNN` runs for each additional step, in order."""

    def called(seq_len: int) -> Counter:
        layer, input = torch.nn.RNN(8, 8), torch.zeros(seq_len, 2, 8)
        with torch.inference_mode(), profile() as profiled:
            layer(input)
        return Counter(event.name.removeprefix("aten::") for event in profiled.events())

    additional = called(STEPS + 1) - called(STEPS)
    return [name for name in additional if name not in NO_WORK]


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str):
    """Draws a labelled box around the point (x, y)."""
    style = "round,pad=0.02,rounding_size=0.08"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor=INK))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK))


def draw_steps(axes: Axes, bottom: float, top: float):
    """Draws the inputs below, the states above, and the initial state on the left."""
    for t in range(STEPS):
        x = SPACING * (t + 1)
        box(axes, x, bottom - 0.75, 0.9, 0.45, f"$x_{t + 1}$", STATE)
        box(axes, x, top + 0.75, 0.9, 0.45, f"$h_{t + 1}$", STATE)
        arrow(axes, (x, bottom - 0.5), (x, bottom))
        arrow(axes, (x, top), (x, top + 0.5))
    middle = (bottom + top) / 2
    box(axes, 0.55, middle, 0.9, 0.45, "$h_0$", STATE)


def main() -> None:
    names = operators_of_a_step()
    figure, axes = pyplot.subplots(figsize=(10, 5.6))
    height = 0.42 * len(names)
    low, high = 3.6, 3.6 + height
    for t in range(STEPS):
        x = SPACING * (t + 1)
        for i, name in enumerate(names):
            box(axes, x, low + 0.42 * (i + 0.5), 1.5, 0.3, name, OPERATOR)
        start = 1.0 if t == 0 else x - SPACING + 0.78
        arrow(axes, (start, (low + high) / 2), (x - 0.78, (low + high) / 2))
    draw_steps(axes, low, high)
    right = SPACING * (STEPS + 1) - 0.9
    axes.text(
        right,
        (low + high) / 2,
        f"nn.RNN\n{len(names)} operators at every step,\neach a separate call",
        va="center",
        fontsize=10,
        color=INK,
    )
    centre, width = SPACING * (STEPS + 1) / 2, SPACING * (STEPS - 1) + 1.7
    text = r"$h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1} W_{hh}^T + b_{hh})$ for every $t$"
    box(axes, centre, 0.5, width, 0.8, text, FUSED)
    draw_steps(axes, 0.1, 0.9)
    arrow(axes, (1.0, 0.5), (centre - width / 2, 0.5))
    axes.text(
        right, 0.5, "FusedRNN\none operator for all steps", va="center", fontsize=10, color=INK
    )
    axes.set_xlim(0, right + 2.6)
    axes.set_ylim(-1.0, high + 1.1)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(PICTURE, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
