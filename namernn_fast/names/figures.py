"""Draws figures as PNG files: the confusion matrix, learning curves and calibration.

All functions write with `replacing`, which replaces a file only once the new one is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .evaluation import Evaluation
from .files import replacing, require
from .text import escaped
from .training import Epoch

# With more languages than this, numbers in the confusion matrix would be too small to read.
_MOST_WITH_NUMBERS = 40
_PARTS = {"train": "training, during the epoch", "validation": "validation, at its end"}
# Colours that colour-blind readers can distinguish (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def draw_confusion_matrix(path: Path, evaluation: Evaluation, title: str) -> None:
    """Draws the confusion matrix of true and predicted languages.

    Colours show fractions of each true language's names, so that rare languages are as visible as
    frequent languages. The numbers are counts of names.
    """
    names = [escaped(scores.language) for scores in evaluation.languages]
    count = len(names)
    shares = [[number / max(sum(row), 1) for number in row] for row in evaluation.confusion]
    size = min(max(0.5 * count, 4), 20)
    figure, axes = _figure(size + 2.5, size + 1.5)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the language's names", shrink=0.8)
    ticks = range(count)
    small = {"fontsize": 10 if count <= _MOST_WITH_NUMBERS else 400 / count}
    axes.set_xticks(ticks, names, **small, rotation=60, ha="right", rotation_mode="anchor")
    sizes = [f"{name} ({sum(row)})" for name, row in zip(names, evaluation.confusion, strict=True)]
    axes.set_yticks(ticks, sizes, **small)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        # A dollar sign in the name of a language must not start a formula.
        label.set_parse_math(False)
    axes.set(xlabel="predicted language", ylabel="language (names)", title=title)
    if count <= _MOST_WITH_NUMBERS:
        for row, numbers in enumerate(evaluation.confusion):
            for column, number in enumerate(numbers):
                colour = "white" if shares[row][column] > 0.5 else "black"
                if number:
                    axes.text(
                        column, row, number, ha="center", va="center", color=colour, fontsize=8
                    )
    _save(figure, path)


def draw_learning_curves(path: Path, history: Sequence[Epoch], title: str) -> None:
    """Draws each network's loss and accuracy in every epoch."""
    figure, (losses, accuracies) = _figure(10, 4.2, columns=2)
    members = sorted({epoch.member for epoch in history})
    for axes, figure_of in ((losses, "loss"), (accuracies, "accuracy")):
        for (part, words), colour in zip(_PARTS.items(), _COLOURS, strict=False):
            for member in members:
                epochs = [epoch for epoch in history if epoch.member == member]
                axes.plot(
                    [epoch.number for epoch in epochs],
                    [getattr(epoch, f"{part}_{figure_of}") for epoch in epochs],
                    color=colour,
                    marker="o" if len(epochs) <= 30 else None,
                    markersize=3,
                    alpha=1 if len(members) == 1 else 0.5,
                    label=words if member == members[0] else None,
                )
        axes.set(xlabel="epoch", ylabel=figure_of)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    many = f" ({len(members)} networks)" if len(members) > 1 else ""
    figure.suptitle(f"{title}{many}")
    _save(figure, path)


def draw_calibration(path: Path, evaluations: Mapping[str, Evaluation], title: str) -> None:
    """Draws each classifier's accuracy against its confidence, in bins of confidence."""
    figure, (axes, counts) = _figure(6, 7, rows=2, height_ratios=[3, 1], sharex=True)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="perfect calibration")
    for place, (name, evaluation) in enumerate(evaluations.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        bins = [(bin.confidence, bin.accuracy) for bin in evaluation.calibration if bin.accuracy]
        shares = [share for _, share in bins]
        error = evaluation.calibration_error
        axes.errorbar(
            [confidence for confidence, _ in bins],
            [share.value for share in shares],
            yerr=[
                [max(share.value - share.low, 0) for share in shares],
                [max(share.high - share.value, 0) for share in shares],
            ],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=f"{name}: expected calibration error {error:.3f}",
        )
        edges = [bin.low for bin in evaluation.calibration] + [1.0]
        numbers = [bin.names for bin in evaluation.calibration]
        counts.stairs(numbers, edges, color=colour, linewidth=1.5)
    axes.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    counts.set(xlabel="probability of the most probable language", ylabel="names")
    counts.grid(alpha=0.3)
    _save(figure, path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """Returns a figure and its axes, without opening a window."""
    figure = require("matplotlib.figure").Figure((width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png")
