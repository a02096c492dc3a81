"""Generates the table, the plots and the README's summary from the raw JSON of a run.

    python -m benchmarks.report.speed [JSON] [--record]

Without `--record` everything is written next to the JSON in `build/bench/`. With `--record` the
JSON and the plots replace the recorded ones in `benchmarks/results/`, and the texts replace their
sections in the README, `docs/performance.md` and `docs/performance_tables.md`.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.harness import grid, pages
from benchmarks.harness.grid import DENSE, FORWARD, FUSED, MODES, PACKED, TRAINING, Workload, shape
from benchmarks.harness.paths import PERFORMANCE, PERFORMANCE_TABLES, README, RESULTS, ROOT, SCRATCH
from benchmarks.harness.spread import speed_up_interval
from benchmarks.report.classes import class_rows, shared
from benchmarks.report.plots import save
from namernn_fast.bench import plot
from namernn_fast.bench.plot import Timings, speed_up, speed_ups
from namernn_fast.bench.tables import TIMES, duration, markdown, ratio
from namernn_fast.bench.workloads import LAYERS_OF

RAW = "latest.json"
OVERVIEW = "overview"
"""The name of the plot in the README."""
WHOLE_GRID = {
    *(*grid.DENSE_WORKLOADS, *grid.PACKED_WORKLOADS),
    *(*grid.EPOCH_WORKLOADS, *grid.GATED_WORKLOADS),
}
"""The workloads that a recorded run must have."""
Spreads = dict[Workload, tuple[float, float]]
"""The 95 % interval of the speed-up, by workload."""
Peaks = dict[Workload, dict[str, int]]
"""The peak bytes of each layer's training step, by workload, where they were measured."""

SUMMARIES = {"worst": min, "geometric mean": statistics.geometric_mean}
CLASSES_CAPTION = (
    "Each layer is compared with torch's own: geometric means of the speed-ups over the sizes that "
    "were timed for every layer, with the number of sizes and the worst speed-up."
)
MEMORY_CAPTION = (
    ": `memory` is how far a training step raises the peak of the resident set of a process that "
    "runs nothing else and has the parameters, the input and the gradients of the results already."
)


def by_layer(raw: Mapping[str, Any], group: str, name: str) -> dict[Workload, dict[str, Any]]:
    """Returns a value of each layer, by workload, where both layers have it."""
    found: dict[Workload, dict[str, Any]] = {}
    for entry in raw["benchmarks"]:
        info = entry["extra_info"]
        if name in entry[group]:
            found.setdefault(Workload.of(info), {})[info["layer"]] = entry[group][name]
    return {workload: values for workload, values in found.items() if len(values) == 2}


def load(raw: Mapping[str, Any]) -> Timings:
    """Returns the median seconds per call of each layer, by workload."""
    return by_layer(raw, "stats", "median")


def spreads(raw: Mapping[str, Any], timings: Timings) -> Spreads:
    """Returns the interval of the speed-up for each workload in `timings`."""
    rounds = by_layer(raw, "stats", "data")
    return {
        workload: speed_up_interval(*(rounds[workload][layer] for layer in workload.layers))
        for workload in timings
    }


def select(timings: Timings, **wanted: object) -> Timings:
    """Returns the workloads with these attributes."""
    return {
        workload: medians
        for workload, medians in timings.items()
        if all(getattr(workload, name) == value for name, value in wanted.items())
    }


def table_rows(timings: Timings, spreads: Spreads, peaks: Peaks) -> Iterator[list[str]]:
    """Yields a row for each shape and batch size, and the worst case and the mean of each family.

    All workloads have one cell. Without `peaks` there are no columns of memory.
    """
    layers = next(iter(timings)).layers
    header = ["(D, H, T)", "B"]
    for mode in MODES:
        header += [f"{mode}: {layers.baseline}", layers.fused, "speed-up", "95 %"]
    if peaks:
        header += [f"memory: {layers.baseline}", layers.fused]
    yield header
    for family in grid.FAMILIES:
        section = select(timings, family=family)
        lines: dict[tuple[str, int], dict[str, Workload]] = {}
        for workload in section:
            lines.setdefault((shape(workload), workload.batch), {})[workload.mode] = workload
        for (label, batch), workloads in lines.items():
            row = [label, str(batch)]
            for mode in MODES:
                row += timing_columns(timings, spreads, workloads.get(mode))
            if peaks:
                sizes = peaks.get(workloads.get(TRAINING), {})
                row += [f"{sizes[name] / 2**20:.1f} MiB" if sizes else "" for name in layers]
            yield row
        if len(section) > 1:
            yield from summary_rows(family, section, len(header))
    yield from summary_rows("all", timings, len(header))


def timing_columns(timings: Timings, spreads: Spreads, workload: Workload | None) -> list[str]:
    """Returns both medians, their ratio and its interval, or blanks if nothing was timed."""
    if workload is None:
        return [""] * 4
    medians, (low, high) = timings[workload], spreads[workload]
    times = (duration(medians[layer]) for layer in workload.layers)
    return [*times, ratio(speed_up(workload, medians)), f"{low:.2f} to {high:.2f}"]


def summary_rows(title: str, timings: Timings, width: int) -> Iterator[list[str]]:
    """Yields rows of `width` entries with the worst and the geometric mean of the speed-ups."""
    for label, summarise in SUMMARIES.items():
        row = [f"{title}: {label}", ""]
        for mode in MODES:
            ratios = speed_ups(select(timings, mode=mode))
            row += ["", "", ratio(summarise(ratios)) if ratios else "", ""]
        yield row + [""] * (width - len(row))


def machine_of(raw: Mapping[str, Any]) -> str:
    """Describes the machine of a run, and what ran on it."""
    machine = raw["machine_info"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['cpu_capability']}; torch {machine['torch']}; "
        f"{FUSED} on `{machine['fused_path']}`; float32."
    )


def caption(raw: Mapping[str, Any]) -> str:
    """Describes how and on which machine a run was measured."""
    counts = [entry["stats"]["rounds"] for entry in raw["benchmarks"]]
    return (
        f"{machine_of(raw)} Medians of {min(counts)} to {max(counts)} rounds, in which the two "
        f"layers alternate, and the 95 % interval of the ratio of the medians. {grid.SIZES} "
        "`forward` is under `inference_mode`; `forward + backward` computes the gradients of all "
        "parameters from fixed random gradients at `output` and the last states. "
        f"Packed batches have lengths from {raw['names']} (`names` instead of T); packing is not "
        "timed. An epoch of the classifier includes its batching and its steps of Adam."
    )


def losses(timings: Timings) -> str:
    """Lists the workloads, all of one cell, in which the fused layer is slower."""
    fused = next(iter(timings)).layers.fused
    slower = [
        f"{shape(workload)} B={workload.batch} {workload.mode} {factor:.2f}{TIMES}"
        for workload, medians in timings.items()
        if (factor := speed_up(workload, medians)) < 1
    ]
    if not slower:
        return f"{fused} is faster in all {len(timings)} workloads."
    return f"{fused} is slower in {len(slower)} of {len(timings)} workloads: {'; '.join(slower)}."


def by_cell(timings: Timings) -> dict[str, Timings]:
    """Returns the workloads of each cell that was timed, by cell."""
    return {cell: found for cell in LAYERS_OF if (found := select(timings, cell=cell))}


def section(raw: Mapping[str, Any]) -> str:
    """Returns the caption of a run, and for each cell its table and its losses."""
    cells, peaks = by_cell(load(raw)), by_layer(raw, "extra_info", "peak_bytes")
    parts = [caption(raw)]
    for cell, cell_timings in cells.items():
        cell_peaks = select(peaks, cell=cell)
        if len(cells) > 1:
            baseline, fused = next(iter(cell_timings)).layers
            parts.append(f"**{fused} over {baseline}**" + (MEMORY_CAPTION if cell_peaks else ""))
        parts.append(markdown(table_rows(cell_timings, spreads(raw, cell_timings), cell_peaks)))
        parts.append(losses(cell_timings))
    if wrong := raw.get("wrong"):
        parts.append(pages.failures(f"- {failure}" for failure in wrong))
    return "\n\n".join(parts)


def classes(raw: Mapping[str, Any]) -> str:
    """Returns the speed-ups of a run by class of workload, with all layers side by side."""
    return f"{machine_of(raw)} {CLASSES_CAPTION}\n\n{markdown(class_rows(load(raw)))}"


def summary(raw: Mapping[str, Any]) -> str:
    """Returns the README's sentence: the mean and the worst speed-up of each layer and mode."""
    timings = load(raw)
    machine = raw["machine_info"]
    layers = []
    for cell_timings in by_cell(timings).values():
        parts = []
        for name, mode in (("inference", FORWARD), ("training", TRAINING)):
            if ratios := speed_ups(select(cell_timings, mode=mode)):
                worst, mean = (ratio(summarise(ratios)) for summarise in SUMMARIES.values())
                parts.append(f"{mean} in {name} (worst {worst})")
        baseline = next(iter(cell_timings)).layers.baseline
        layers.append(f"over `{baseline}`: {' and '.join(parts)}")
    tables = PERFORMANCE_TABLES.relative_to(ROOT).as_posix()
    return (
        f"Geometric mean of the speed-up {'; '.join(layers)}, over the "
        f"{len(timings)} workloads in [the tables]({tables}); they and the plot were "
        f"measured on {machine['cpu']} (`{machine['fused_path']}`) with {machine['threads']} "
        "threads, in float32."
    )


def table_and_plots(raw: Mapping[str, Any]) -> str:
    """Returns the section of docs/performance_tables.md for a recorded run."""
    return "\n\n".join((section(raw), link(DENSE, "../"), link(PACKED, "../")))


def summary_and_plot(raw: Mapping[str, Any]) -> str:
    """Returns the section of the README for a recorded run."""
    return f"{link(OVERVIEW)}\n\n{summary(raw)}"


def link(name: str, up: str = "") -> str:
    """Returns the Markdown of a plot; `up` is the path from the page to the repository's root."""
    place = f"{up}{plot_path(RESULTS, name).relative_to(ROOT).as_posix()}"
    return f"![Speed-up against batch size, {name}]({place})"


def plot_path(folder: Path, name: str) -> Path:
    """Returns the path of a plot: the overview, or the plot of a family of workloads."""
    return folder / f"speedup_{name}.png"


def draw(timings: Timings, folder: Path) -> list[Path]:
    """Draws the speed-up against the batch size; returns the files.

    The overview has a panel for each mode and a line for each layer: geometric means over the dense
    sizes that were timed for all layers. The figure of dense input has a panel for each layer and
    mode, the figure of packed input one for each layer and shape.
    """
    dense, packed = select(timings, family=DENSE), select(timings, family=PACKED)
    cells = by_cell(timings)

    def title(cell: str, text: str) -> str:
        return f"{LAYERS_OF[cell].fused}:\n{text}" if len(cells) > 1 else text

    overview = {
        mode: {
            LAYERS_OF[cell].fused: mean_points(select(shared(dense), cell=cell, mode=mode))
            for cell in cells
        }
        for mode in MODES
    }
    dense_panels = {
        title(cell, mode): lines(select(dense, cell=cell, mode=mode), shape)
        for cell in cells
        for mode in MODES
    }
    packed_panels = {
        title(cell, f"D = {size} inputs, H = {hidden} hidden units"): lines(
            select(packed, cell=cell), attrgetter("mode")
        )
        for cell in cells
        for size, hidden in dict.fromkeys((w.input_size, w.hidden_size) for w in packed)
    }
    sizes = "(D, H, T):\ninput size,\nhidden size,\nsequence length"
    compared = [LAYERS_OF[cell] for cell in cells]
    paths = []
    for name, text, panels, legend in (
        (OVERVIEW, "dense input, mean of sizes", overview if dense else {}, None),
        (DENSE, "dense input", dense_panels if dense else {}, sizes),
        (PACKED, "packed input", packed_panels, None),
    ):
        if panels:
            paths.append(plot_path(folder, name))
            save(plot.draw(text, panels, legend, compared), paths[-1])
    return paths


def lines(timings: Timings, label: Callable[[Workload], str]) -> dict[str, plot.Points]:
    """Returns the speed-up of each workload by its batch size, in a line for each label."""
    found: dict[str, plot.Points] = {}
    for workload, medians in timings.items():
        found.setdefault(label(workload), {})[workload.batch] = speed_up(workload, medians)
    return found


def mean_points(timings: Timings) -> plot.Points:
    """Returns the geometric mean of the speed-ups at each batch size."""
    return {
        batch: statistics.geometric_mean(speed_ups(select(timings, batch=batch)))
        for batch in sorted({workload.batch for workload in timings})
    }


def publish(raw: Mapping[str, Any], record: bool) -> None:
    """Writes the raw JSON, the tables, the summary and the plots of a run, and prints the texts."""
    timings = load(raw)
    if not timings:
        raise SystemExit("the run has no workload in which both layers were timed")
    if record and timings.keys() != WHOLE_GRID:
        raise SystemExit("the run lacks workloads of the grid and cannot be recorded")
    table, by_class, sentence = section(raw), classes(raw), summary(raw)
    print(f"{table}\n\n{by_class}\n\n{sentence}")
    folder = pages.folder_of(record)
    pyplot.switch_backend("Agg")
    plots = draw(timings, folder)
    if record:
        table, sentence = table_and_plots(raw), summary_and_plot(raw)
    file = folder / RAW
    file.write_text(json.dumps(raw) + "\n", encoding="utf-8")
    pages.announce(
        file,
        pages.write_text(folder, "benchmark table", table, record, PERFORMANCE_TABLES),
        pages.write_text(folder, "classes", by_class, record, PERFORMANCE),
        pages.write_text(folder, "speed", sentence, record, README),
        *plots,
    )


def main() -> None:
    parser = pages.parser(__doc__)
    parser.add_argument("json", type=Path, nargs="?", help="the raw JSON of a run")
    options = pages.parse(parser)
    path = options.json or (RESULTS if options.record else SCRATCH) / RAW
    publish(json.loads(path.read_text(encoding="utf-8")), options.record)


if __name__ == "__main__":
    main()
