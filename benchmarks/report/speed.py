"""Turn a run's raw JSON into its table, its plots and the README's section.

    python -m benchmarks.report [JSON] [--write-readme]

Every figure comes from the JSON; the plots are written beside it.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.harness.grid import (
    BASELINE,
    BATCHES,
    DENSE,
    FAMILIES,
    FUSED,
    LAYERS,
    MODES,
    PACKED,
    Cell,
)
from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import README, RESULTS, ROOT
from benchmarks.harness.tables import TIMES, duration, markdown, ratio, shape

# Okabe and Ito's colours, apart to colour-blind eyes too; the markers tell lines apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")

Medians = dict[str, float]
Timings = dict[Cell, Medians]


def load(raw: Mapping[str, Any]) -> Timings:
    """The median seconds per call of each layer in each cell."""
    timings: Timings = {}
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        timings.setdefault(Cell.of(info), {})[info["layer"]] = entry["stats"]["median"]
    return {cell: medians for cell, medians in timings.items() if len(medians) == 2}


def select(timings: Timings, **wanted: object) -> Timings:
    """The cells that have the wanted attributes."""
    return {
        cell: medians
        for cell, medians in timings.items()
        if all(getattr(cell, name) == value for name, value in wanted.items())
    }


def speed_up(medians: Medians) -> float:
    return medians[BASELINE] / medians[FUSED]


def table_rows(timings: Timings) -> Iterator[list[str]]:
    """A row for each shape and batch size, and the worst and mean of each family and of all."""
    header = ["(D, H, T)", "B"]
    for mode in MODES:
        header += [f"{mode}: {BASELINE}", FUSED, "speed-up"]
    yield header
    for family in FAMILIES:
        section = select(timings, family=family)
        for label, batch in dict.fromkeys((shape(cell), cell.batch) for cell in section):
            row = [label, str(batch)]
            for mode in MODES:
                row += timing_columns(
                    medians
                    for cell, medians in select(section, batch=batch, mode=mode).items()
                    if shape(cell) == label
                )
            yield row
        if len(section) > 1:
            yield from summary_rows(family, section)
    yield from summary_rows("all", timings)


def timing_columns(found: Iterable[Medians]) -> list[str]:
    """Both medians and their ratio, or blanks for what was not timed."""
    for medians in found:
        return [*(duration(medians[layer]) for layer in LAYERS), ratio(speed_up(medians))]
    return ["", "", ""]


def summary_rows(title: str, timings: Timings) -> Iterator[list[str]]:
    for label, summarise in (("worst", min), ("geometric mean", statistics.geometric_mean)):
        row = [f"{title}: {label}", ""]
        for mode in MODES:
            ratios = [*map(speed_up, select(timings, mode=mode).values())]
            row += ["", "", ratio(summarise(ratios)) if ratios else ""]
        yield row


def caption(raw: Mapping[str, Any]) -> str:
    machine = raw["machine_info"]
    counts = [entry["stats"]["rounds"] for entry in raw["benchmarks"]]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['cpu_capability']}; torch {machine['torch']}; "
        f"{FUSED} on `{machine['fused_path']}`; float32. "
        f"Medians of {min(counts)} to {max(counts)} rounds, in which the two layers alternate. "
        "`forward` is under `inference_mode`; `forward + backward` has the gradients of all "
        "parameters from `h_n.sum()`. "
        f"Packed batches have lengths from {raw['names']}, and are packed outside of what is "
        "timed, for both layers. An epoch of the classifier is its batching and its steps of Adam."
    )


def losses(timings: Timings) -> str:
    slower = [
        f"{shape(cell)} B={cell.batch} {cell.mode} {speed_up(medians):.2f}{TIMES}"
        for cell, medians in timings.items()
        if speed_up(medians) < 1
    ]
    if not slower:
        return f"{FUSED} is faster in all of the {len(timings)} cells."
    return f"{FUSED} is slower in {len(slower)} of {len(timings)} cells: {'; '.join(slower)}."


def section(raw: Mapping[str, Any], timings: Timings) -> str:
    return "\n\n".join((caption(raw), markdown(table_rows(timings)), losses(timings)))


def draw(timings: Timings, folder: Path) -> dict[str, Path]:
    """Draw the speed-up against the batch size: a panel a mode, or a packed shape."""
    dense, packed = select(timings, family=DENSE), select(timings, family=PACKED)
    dense_panels = {
        mode: {
            label: {c: m for c, m in select(dense, mode=mode).items() if shape(c) == label}
            for label in dict.fromkeys(map(shape, dense))
        }
        for mode in MODES
    }
    packed_panels = {
        f"(D, H, T) = {label}": {mode: select(packed, mode=mode) for mode in MODES}
        for label in dict.fromkeys(map(shape, packed))
    }
    return {
        family: save_figure(folder / f"speedup_{family}.png", f"{family} input", panels, legend)
        for family, panels, legend in (
            (DENSE, dense_panels, "(D, H, T)"),
            (PACKED, packed_panels, None),
        )
        if panels
    }


def save_figure(
    path: Path, title: str, panels: Mapping[str, Mapping[str, Timings]], legend: str | None
) -> Path:
    """Save one figure: panels by their titles, in each the lines by their labels."""
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(2.2 + 3.6 * len(panels), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (subtitle, lines) in zip(axes[0], panels.items(), strict=True):
        for (label, line), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
            points = {cell.batch: speed_up(medians) for cell, medians in line.items()}
            panel.plot([*points], [*points.values()], color=colour, marker=marker, label=label)
        panel.axhline(1, color="0.3", linewidth=1, linestyle="--")
        panel.set(title=subtitle, xlabel="batch size", xscale="log", yscale="log")
        panel.set_xticks(BATCHES, labels=map(str, BATCHES))
        panel.minorticks_off()
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    first = axes[0, 0]
    # From a little below one, so that a loss shows as one, and to one tick above it at least.
    low, high = min(first.get_ylim()[0], 0.8), max(first.get_ylim()[1], 2.2)
    ticks = [2.0**power for power in range(-5, 8) if low <= 2.0**power <= high]
    first.set(ylim=(low, high), ylabel=f"{BASELINE} time / {FUSED} time")
    first.set_yticks(ticks, labels=[f"{tick:g}{TIMES}" for tick in ticks])
    figure.suptitle(f"Speed-up of {FUSED} over {BASELINE}: {title}")
    figure.legend(
        *first.get_legend_handles_labels(),
        title=legend,
        loc="outside right center",
        frameon=False,
    )
    # Without the version of matplotlib the same figures give the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "latest.json")
    parser.add_argument("--write-readme", action="store_true")
    options = parser.parse_args()

    raw = json.loads(options.json.read_text(encoding="utf-8"))
    timings = load(raw)
    if not timings:
        raise SystemExit(f"{options.json.name} holds no cell in which both layers were timed")
    text = section(raw, timings)
    print(text)
    pyplot.switch_backend("Agg")
    drawn = draw(timings, options.json.resolve().parent)
    if options.write_readme:
        images = (
            f"![Speed-up against batch size, {family} input]({path.relative_to(ROOT).as_posix()})"
            for family, path in drawn.items()
        )
        write_section(README, "benchmark table", "\n\n".join((text, *images)))


if __name__ == "__main__":
    main()
