"""Tables and plots of the GPU benchmark."""

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.race import (
    FAILED,
    GPU,
    LATE,
    MEASURED,
    RED,
    WRONG_RIVAL,
    Platform,
    Row,
    known_names,
)
from benchmarks.harness import columns, pages
from benchmarks.harness.columns import BATCH, SHAPE, Column
from benchmarks.harness.grid import BASELINE, FORWARD, FUSED, SIZES, TRAINING, Workload, shape
from namernn_fast.bench.tables import SLOWER, markdown, ratio


def speed_up(row: Row) -> float:
    """Returns the speed-up of the fused layer over its rival."""
    return row["medians"][row["rival"]] / row["medians"][FUSED]


def title(row: Row) -> str:
    """Returns a row's workload, precision and launch method as a title."""
    return f"{Workload.of(row)} {row['precision']} {row['launch']}"


def microseconds(layer: str) -> Column:
    """Returns a column with a layer's times."""

    def entry(row: Row) -> str:
        medians = row.get("medians", {})
        return f"{1e6 * medians[layer]:.1f}" if layer in medians else ""

    return columns.text(layer, entry)


def outcome(row: Row) -> str:
    """Returns the speed-up, or why there is none."""
    return ratio(speed_up(row)) if row["status"] == MEASURED else row["status"]


def table(rows: list[Row], rival: str) -> str:
    """Returns a table with a line per shape, batch size, precision and launch, and all modes."""
    keys = SHAPE, BATCH, columns.key("precision", "precision"), columns.key("launch", "launch")
    shown = map(microseconds, (rival, FUSED))
    return columns.table(rows, (*keys, *shown, columns.text("speed-up", outcome)), beside=["mode"])


def summary(rows: list[Row]) -> str:
    """Returns a table of mean and worst speed-ups by mode, precision and launch, and by mode."""
    head = ["mode", "precision", "launch", "workloads", "geometric mean", "worst", "worst workload"]
    lines = [head]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["precision"], row["launch"]), []).append(row)
        groups.setdefault((row["mode"], "all", "all"), []).append(row)
    for group, members in sorted(groups.items()):
        ratios = {title(row): speed_up(row) for row in members}
        worst = min(ratios, key=ratios.__getitem__)
        mean = statistics.geometric_mean(ratios.values())
        lines.append([*group, str(len(ratios)), ratio(mean), ratio(ratios[worst]), worst])
    return markdown(lines)


def listed(what: str, rows: list[str]) -> str:
    """Returns a heading with the number of rows, followed by a list of the rows."""
    return "\n".join((f"{what}: {len(rows)}", *(f"- {row}" for row in rows)))


def section(rows: list[Row], rival: str) -> str:
    """Returns the section that compares the layer with one rival."""
    rows = [row for row in rows if row["rival"] == rival]
    measured = [row for row in rows if row["status"] == MEASURED]
    parts = [f"## Against {rival}", summary(measured) if measured else "Nothing was measured."]
    slower = [f"{title(row)} {speed_up(row):.2f}" for row in measured if speed_up(row) < 1]
    parts.append(listed(f"{FUSED} under 1.0x", slower))
    for status in (RED, WRONG_RIVAL, FAILED):
        found = [f"{title(r)}: {r['why'].splitlines()[0]}" for r in rows if r["status"] == status]
        parts.append(listed(status, found))
    parts.append(listed(LATE, [title(row) for row in rows if row["status"] == LATE]))
    elsewhere = [row for row in measured if not row["fused_path"].startswith("triton")]
    parts.append(listed(f"{FUSED} not on Triton", [title(row) for row in elsewhere]))
    not_cudnn = [row for row in measured if row["nn.RNN_path"] != "cuDNN"]
    parts.append(listed(f"{BASELINE} not on cuDNN", [title(row) for row in not_cudnn]))
    return "\n\n".join((*parts, table(rows, rival)))


def describe(platform: Platform) -> dict[str, Any]:
    """Describes the machine and the libraries, for comparison with other runs."""
    on_gpu, names = platform is GPU, known_names()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "Triton's interpreter",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "triton": triton.__version__,
        "names": f"{len(names.rows):,} {'of the embedded sample' if names.is_sample else 'names'}",
    }


def report(document: dict[str, Any]) -> str:
    machine = document["machine"]
    how = (
        "Medians in microseconds of `triton.testing.do_bench`, which empties the L2 cache before "
        "every call; each layer has two laps, in opposite order. `eager` is a call from Python: "
        "part of its launch overhead is hidden while the GPU empties the cache. `CUDA graph` is "
        "one replay."
        if document["measurement"]
        else "A dry run under Triton's interpreter: its times mean nothing."
    )
    introduction = (
        f"{machine['device']}; torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN "
        f"{machine['cudnn']}, Triton {machine['triton']}. {how} "
        "`tf32` is torch's default for an RNN in float32, `float32` rounds nothing. "
        f"`{FORWARD}` is under `inference_mode`; `{TRAINING}` computes the gradients of all "
        "parameters from fixed random gradients at `output` and `h_n`. "
        f"Packed batches have the lengths of names, drawn from {machine['names']}; packing is not "
        "timed. Every workload passed the gate in every precision and launch before it was timed. "
        f"{SIZES} {SLOWER} marks a loss."
    )
    rivals = dict.fromkeys(row["rival"] for row in document["rows"])
    return "\n\n".join((introduction, *(section(document["rows"], r) for r in rivals))) + "\n"


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draws speed-ups against the batch size: a figure per mode and launch, a panel per shape."""
    from matplotlib import pyplot

    from benchmarks.report.plots import save
    from namernn_fast.bench.plot import Points, draw, speed_up
    from namernn_fast.bench.workloads import LAYERS_OF

    pyplot.switch_backend("Agg")
    figures: dict[tuple[str, str], dict[str, dict[str, Points]]] = {}
    for row in rows:
        if row["status"] == MEASURED and row["rival"] == BASELINE:
            panels = figures.setdefault((row["mode"], row["launch"]), {})
            workload = Workload.of(row)
            line = panels.setdefault(shape(workload), {}).setdefault(row["precision"], {})
            line[workload.batch] = speed_up(workload, row["medians"])
    paths = []
    for (mode, launch), panels in figures.items():
        file = "_".join(("gpu", *f"{mode} {launch}".lower().replace("+", "and").split()))
        paths.append(folder / f"{file}.png")
        save(draw(f"{mode}, {launch}", panels, "precision", [LAYERS_OF["rnn"]]), paths[-1])
    return paths


def publish(document: dict[str, Any], folder: Path) -> None:
    """Writes raw rows, the table and, with matplotlib, the plots; prints their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    text = report(document)
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    pages.announce(folder)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the plots are left out")
    else:
        plot(document["rows"], folder)
