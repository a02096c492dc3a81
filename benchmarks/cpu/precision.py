"""Times float32 layers in lower precision: `python -m benchmarks.cpu.precision [--record]`.

The fused layers and torch's layers alternate, both with the settings of
`torch.set_float32_matmul_precision` and of `torch.backends.mkldnn.rnn`, which `nn.LSTM` follows.
The tests check the results against the error budget of each setting.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import medians, pages
from benchmarks.harness.grid import DENSE, MODES, Workload, shape
from benchmarks.harness.precision import precision_of_products
from namernn_fast.bench.race import TimedCall
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import call_of, draw_gradients, equal_layers
from namernn_fast.bench.workloads import LAYERS_OF

SHAPES = (  # D, H, T, B
    (256, 256, 64, 16),
    (256, 256, 64, 128),
    (512, 512, 32, 64),
    (1024, 1024, 16, 32),
    (1024, 1024, 16, 256),
)
TIMED = (  # role of the layer, precision
    ("baseline", "highest"),
    ("baseline", "medium"),
    ("fused", "highest"),
    ("fused", "high"),
    ("fused", "medium"),
)
RATIOS = {  # heading: the faster and the slower of TIMED
    "high / nn": (("fused", "high"), ("baseline", "highest")),
    "medium / nn": (("fused", "medium"), ("baseline", "medium")),
}
"""torch's layers ignore `high` on a CPU."""


def workloads() -> list[Workload]:
    """Returns every cell, shape and mode."""
    return [
        Workload(DENSE, mode, batch, input_size, hidden_size, steps, cell)
        for mode in MODES
        for cell in LAYERS_OF
        for input_size, hidden_size, steps, batch in SHAPES
    ]


def calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns a call for each of `TIMED`, by role and precision."""
    torch.manual_seed(0)
    input = torch.randn(workload.seq_len or 0, workload.batch, workload.input_size)
    layers = dict(zip(workload.layers._fields, equal_layers(workload).values(), strict=True))

    def with_precision(call: TimedCall, name: str) -> Callable[[], Any]:
        def timed() -> Any:
            with precision_of_products(name):
                return call()

        return timed

    found = {}
    for role, name in TIMED:
        gradients = draw_gradients(layers[role], input)
        call = call_of(layers[role], input, workload.mode, gradients)
        found[f"{role} {name}"] = with_precision(call, name)
    return found


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """Returns a line for each workload of a mode, and the geometric means."""
    lines = [["layer", "(D, H, T)", "B", *(f"{role} {name}" for role, name in TIMED), *RATIOS]]
    ratios: dict[str, list[float]] = {heading: [] for heading in RATIOS}
    for row in rows:
        if row["mode"] != mode:
            continue
        seconds, workload = row["medians"], Workload.of(row)
        line = [workload.layers.fused, shape(workload), str(workload.batch)]
        line += [duration(seconds[f"{role} {name}"]) for role, name in TIMED]
        for heading, (faster, slower) in RATIOS.items():
            ratios[heading].append(seconds[" ".join(slower)] / seconds[" ".join(faster)])
            line.append(ratio(ratios[heading][-1]))
        lines.append(line)
    if len(lines) == 1:  # no workload is small enough for --quick
        return markdown(lines)
    means = ", ".join(
        f"{heading} {ratio(statistics.geometric_mean(values))}, worst {ratio(min(values))}"
        for heading, values in ratios.items()
    )
    return f"{markdown(lines)}\n\nGeometric means: {means}."


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    introduction = (
        f"{document['cpu']}, {document['threads']} thread(s); bfloat16 products on "
        f"`{document['bfloat16']}`. `baseline` is torch's layer, `fused` ours. torch's layers "
        "ignore `high` on a CPU, so `high` is compared with torch's layer at `highest`."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    medians.run("precision", __doc__, workloads(), calls, report)


if __name__ == "__main__":
    main()
