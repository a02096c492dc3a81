"""Times 8-bit weights against float32: `python -m benchmarks.cpu.eight_bits [--record]`.

Prepared layers with both types of weights, torch.ao's quantized layers and onnxruntime's quantized
LSTM take turns, with a pause between each two; so do single steps of streams. With `--record`
layers are timed on one thread and on `--threads`.
"""

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cpu.prepared import PAUSE
from benchmarks.cpu.rivals import Problem, bound_session, onnx_model
from benchmarks.harness import pages
from benchmarks.harness.grid import DENSE, FORWARD, SIZES, Workload, shape
from benchmarks.harness.machine import read_rate
from namernn_fast import ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race, warm_up
from namernn_fast.bench.tables import duration, markdown, ratio
from namernn_fast.bench.timed_calls import equal_layers
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS, LSTM, VANILLA
from namernn_fast.testing import BudgetError, max_error

SHAPES = (  # D, H, T, B
    (256, 256, 32, 1),
    (512, 512, 32, 1),
    (1024, 1024, 16, 1),
    (256, 256, 32, 16),
    (512, 512, 32, 64),
    (1024, 1024, 16, 32),
)
STEPS = tuple((size, size, 1, batch) for size in (64, 128, 256, 512, 1024) for batch in (1, 8))
DTYPES = {"float32": None, "int8": torch.int8}
"""What `prepare()` takes, by the type of the weights."""
RIVALS = ("onnxruntime", "torch.ao")
ENGINES = ("x86", "onednn")
"""torch.ao's engines: one is faster for one sequence, the other for many."""
MAX_ERROR = 0.03
"""Rounding to 8 bits changes outputs by about half as much at most at these sizes; swapped gates or
a missing bias change them by more."""
MAX_RIVAL_ERROR = 0.1
"""torch.ao has one scale for a whole matrix, so its errors are larger."""
ROW_BYTES = 8
"""The scale and the sum of a row of 8-bit weights."""
SECONDS = 0.05
"""How long the rate of reading and each of torch.ao's engines are measured."""


def workloads(shapes: tuple[tuple[int, int, int, int], ...]) -> list[Workload]:
    """Returns every cell and shape."""
    return [
        Workload(DENSE, FORWARD, batch, input_size, hidden_size, steps, cell)
        for cell in LAYERS_OF
        for input_size, hidden_size, steps, batch in shapes
    ]


def prepared(workload: Workload) -> dict[str, Any]:
    """Returns the prepared layers by the type of their weights."""
    layer: Any = equal_layers(workload)[workload.layers.fused]
    return {name: layer.prepare(dtype) for name, dtype in DTYPES.items()}


def onnxruntime_call(problem: Problem) -> TimedCall:
    """Returns the call of onnxruntime's `DynamicQuantizeLSTM`, with bound input and outputs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_model_from_string(onnx_model(problem))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8)
        run, bound = bound_session(path.read_bytes(), problem, torch.get_num_threads())

    def call() -> torch.Tensor:
        run()
        return torch.from_numpy(bound["Y"]).squeeze(1)

    return call


def torch_ao_call(problem: Problem, hx: Any) -> TimedCall:
    """Returns the call of torch.ao's quantized layer, on the engine that is faster for it."""
    layer, quantized = problem.baseline, torch.backends.quantized
    before, calls = quantized.engine, []
    for engine in [name for name in ENGINES if name in quantized.supported_engines]:
        quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates torch.ao
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})
        calls.append(lambda model=model[0]: model(problem.input, hx)[0])
    quantized.engine = before
    return min(calls, key=lambda call: warm_up(call, SECONDS))


def layer_calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the calls of the prepared layers and of the rivals, which return the output."""
    theirs, cell = equal_layers(workload)[workload.layers.baseline].eval(), CELLS[workload.cell]
    input = torch.randn(workload.seq_len or 0, workload.batch, workload.input_size)
    size = 1, workload.batch, workload.hidden_size
    states = tuple(torch.randn(size).tanh() for _ in cell.states)
    hx = states if len(states) > 1 else states[0]
    problem = Problem(workload, theirs, input, (), states)
    found: dict[str, TimedCall] = {
        name: lambda layer=layer: layer(input, hx)[0] for name, layer in prepared(workload).items()
    }
    if cell is not VANILLA:  # torch.ao has no nn.RNN
        found["torch.ao"] = torch_ao_call(problem, hx)
    if cell is LSTM and find_spec("onnx") and find_spec("onnxruntime"):
        found["onnxruntime"] = onnxruntime_call(problem)
    return found


def step_calls(workload: Workload) -> dict[str, TimedCall]:
    """Returns the calls of a stream's step with both types of weights."""
    frame, found = torch.randn(workload.batch, workload.input_size), dict[str, TimedCall]()
    for name, layer in prepared(workload).items():
        stream = layer.stream(workload.batch)
        out = torch.empty(workload.batch, workload.hidden_size)
        found[name] = lambda stream=stream, out=out: stream(frame, out=out)
    return found


def errors_of(calls: dict[str, TimedCall]) -> dict[str, float]:
    """Returns the largest error of each call, compared with float32.

    Raises:
        BudgetError: An error is too large.
    """
    exact = calls["float32"]()
    errors = {name: max_error(call(), exact) for name, call in calls.items() if name != "float32"}
    for name, error in errors.items():
        if not error < (MAX_ERROR if name in DTYPES else MAX_RIVAL_ERROR):
            raise BudgetError(f"{name} is off by {error:.2g}")
    return errors


def bytes_read(workload: Workload) -> int:
    """Returns the least bytes of 8-bit weights that a call reads: weight_hh in every step."""
    rows = CELLS[workload.cell].weight_blocks * workload.hidden_size
    input, state = workload.input_size + ROW_BYTES, workload.hidden_size + ROW_BYTES
    return rows * (input + (workload.seq_len or 0) * state)


def measure(
    timed: list[Workload],
    calls: Callable[[Workload], dict[str, TimedCall]],
    threads: int,
    options: argparse.Namespace,
    wrong: list[str],
) -> list[dict[str, Any]]:
    """Times workloads; returns a row for each whose results are correct."""
    pages.settle(threads)
    rows, budget = [], pages.time_budget(options, max_rounds=20)
    for workload in pages.chosen(timed, options):
        row: dict[str, Any] = {**dataclasses.asdict(workload), "threads": threads}
        with pages.gated(row, wrong), torch.inference_mode():
            found = calls(workload)
            row["errors"] = errors_of(found)
            rounds = {name: r.seconds for name, r in race(found, budget, PAUSE).items()}
            row["medians"] = {name: statistics.median(values) for name, values in rounds.items()}
            row["ratios"] = {
                name: statistics.median(a / b for a, b in zip(values, rounds["int8"], strict=True))
                for name, values in rounds.items()
            }
            once = bytes_read(dataclasses.replace(workload, seq_len=1))
            row["read_rate"] = read_rate(threads, once, SECONDS)
            rows.append(row)
            print(row, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each workload, and the geometric means and the worst of the ratios."""
    rivals = [name for name in RIVALS if any(name in row["ratios"] for row in rows)]
    found = {
        name: [row["ratios"][name] for row in rows if name in row["ratios"]]
        for name in ("float32", *rivals)
    }
    header = ["layer", "(D, H, T)", "B", *DTYPES, *(f"over {name}" for name in found), "MB read"]
    header += ["GB/s", "of the read rate", "error", *(f"error of {name}" for name in rivals)]
    lines = [header]
    for row in rows:
        workload, ratios, errors = Workload.of(row), row["ratios"], row["errors"]
        size = bytes_read(workload)
        rate = size / row["medians"]["int8"]
        line = [workload.layers.fused, shape(workload), str(workload.batch)]
        line += [duration(row["medians"][name]) for name in DTYPES]
        line += [ratio(ratios[name]) if name in ratios else "" for name in found]
        line += [f"{size / 1e6:.3g}", f"{rate / 1e9:.1f}", f"{rate / row['read_rate']:.0%}"]
        line += [f"{errors[name]:.4f}" if name in errors else "" for name in ("int8", *rivals)]
        lines.append(line)
    means = "; ".join(
        f"over {name} {ratio(statistics.geometric_mean(ratios))}, at least {ratio(min(ratios))}"
        for name, ratios in found.items()
        if ratios
    )
    return f"{markdown(lines)}\n\nGeometric means: {means}."


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each layer and size."""
    lines = [["layer", "H", *(f"{name}, KiB" for name in DTYPES), "int8 of float32"]]
    for row in rows:
        sizes = [f"{row[name] / 2**10:,.0f}" for name in DTYPES]
        share = f"{row['int8'] / row['float32']:.0%}"
        lines.append([Workload.of(row).layers.fused, str(row["hidden_size"]), *sizes, share])
    return markdown(lines)


def memory() -> list[dict[str, Any]]:
    """Returns the bytes of both types of weights, for each cell and size."""
    return [
        dataclasses.asdict(workload)
        | {name: layer._panels.tensor.nbytes for name, layer in prepared(workload).items()}
        for workload in workloads(STEPS)
        if workload.batch == 1
    ]


def report(document: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    parts = [
        f"{document['cpu']}; 8-bit products on `{document['int8']}`, float32 on "
        f"`{document['float32']}`. `float32` and `int8` are prepared layers with these "
        "weights. The speed-ups of int8 over float32, over onnxruntime's LSTM with 8-bit weights "
        "and a scale for each row, and over torch.ao's quantized layer on the faster of two "
        "engines are medians of the ratios within a round. `MB read` is what a call with 8-bit "
        "weights must read: weight_ih once, and weight_hh in each step. The read rate is that "
        "of threads that reread a block as large as the weights; a layer can exceed it, because "
        "every other step reads weight_hh backwards, beginning with what is still in the cache. An "
        "error is the largest difference of the output from float32. Every call of a layer gets "
        f"initial states. {SIZES}"
    ]
    for threads in dict.fromkeys(row["threads"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["threads"] == threads]
        parts += [f"**Layers, {threads} thread(s)**", table(rows)]
    parts += ["**One step of a stream, 1 thread(s), with `out=`**", table(document["steps"])]
    parts += ["**Memory of the packed weights, D = H**", memory_table(document["memory"])]
    return "\n\n".join(parts)


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=1.5))
    wrong: list[str] = []
    document: dict[str, Any] = {"cpu": cpu_name(), "memory": memory(), "rows": []}
    document |= {
        name: f"cpu {ops.cpu_kernel(dtype or torch.float32)}" for name, dtype in DTYPES.items()
    }
    for threads in sorted({1, options.threads}) if options.record else [options.threads]:
        document["rows"] += measure(workloads(SHAPES), layer_calls, threads, options, wrong)
    document["steps"] = measure(workloads(STEPS), step_calls, 1, options, wrong)
    pages.publish("eight_bits", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
