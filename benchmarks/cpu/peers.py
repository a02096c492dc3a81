"""Race the layer against others that compute the same: `python -m benchmarks.peers [options]`.

Every peer that is installed gets the same weights and input, must agree with a float64 oracle, and
then takes turns with the others, round by round, in one process. The rows go to a JSON file in
`results/`, the tables to the terminal and, with --write, into docs/performance.md.
"""

import argparse
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import gate, pages
from benchmarks.harness.grid import BASELINE, DENSE, FORWARD, FUSED, PACKED, TRAINING, Cell
from benchmarks.harness.machine import cpu_name, hop
from benchmarks.harness.race import Budget, Call, race
from benchmarks.harness.tables import duration, markdown, ratio, shape
from benchmarks.harness.workload import train
from namernn_fast import FusedRNN

# (input_size, hidden_size, seq_len, batch)
SHAPES = (
    *((64, 64, 8, batch) for batch in (1, 16)),
    *((64, 256, 8, batch) for batch in (1, 16, 64, 256, 1024)),
    *((128, 128, 128, batch) for batch in (1, 16, 64, 256)),
    *((512, 512, 128, batch) for batch in (1, 32)),
    (1024, 1024, 64, 64),
)
ODD_SHAPES = (
    *((64, hidden, 8, 64) for hidden in (100, 200, 300, 384)),
    *((size, 256, 8, 64) for size in (1, 57, 300)),
    *((64, 256, 8, batch) for batch in (3, 7, 48, 100)),
    *((64, 256, steps, 16) for steps in (1, 3, 1000)),
    (57, 100, 3, 7),
    (1, 300, 1000, 3),
)
PACKED_BATCHES = (16, 64, 256, 1024)
LENGTHS = (2, 12)
PREPACKED = "FusedRNN.prepack()"
# Other implementations round in their own ways; a wrong formula is off by far more.
PEER_ERROR = 1e-4


@dataclass(frozen=True)
class Problem:
    """One cell's weights and input, as tensors and as arrays."""

    cell: Cell
    baseline: nn.RNN
    input: Tensor

    @property
    def weights(self) -> list[np.ndarray]:
        return [p.detach().numpy() for p in self.baseline.parameters()]


Peer = Callable[[Problem, int], Call | None]
"""From a problem and a number of threads to a call that returns h_n, or the gradients of weight_ih,
weight_hh and the biases' sum; None where the peer has no such thing."""


def in_place_loop(problem: Problem, threads: int) -> Call | None:
    """PyTorch's own operators with as little overhead as a user can have."""
    if problem.cell.mode == TRAINING:
        return None
    weight_ih, weight_hh, bias_ih, bias_hh = problem.baseline.parameters()
    w_x, w_h, bias = weight_ih.t(), weight_hh.t(), (bias_ih + bias_hh).detach()
    steps, batch, _ = problem.input.shape

    def call() -> Tensor:
        z = torch.addmm(bias, problem.input.flatten(0, 1), w_x).view(steps, batch, -1)
        h = z[0].tanh_()
        for t in range(1, steps):
            h = z[t].addmm_(h, w_h).tanh_()
        return h

    return call


def numpy_loop(problem: Problem, threads: int) -> Call | None:
    if problem.cell.mode == TRAINING:
        return None
    weight_ih, weight_hh, bias_ih, bias_hh = problem.weights
    x, w_x, w_h, bias = problem.input.numpy(), weight_ih.T, weight_hh.T, bias_ih + bias_hh

    def call() -> np.ndarray:
        z = x @ w_x + bias
        h = np.tanh(z[0], out=z[0])
        for t in range(1, len(x)):
            z[t] += h @ w_h
            h = np.tanh(z[t], out=z[t])
        return h

    return call


def jax_scan(problem: Problem, threads: int) -> Call | None:
    import jax
    import jax.numpy as jnp

    weight_ih, weight_hh, bias_ih, bias_hh = map(jnp.asarray, problem.weights)
    x, parameters = jnp.asarray(problem.input.numpy()), (weight_ih, weight_hh, bias_ih + bias_hh)
    start = jnp.zeros((problem.cell.batch, problem.cell.hidden_size))

    def run(parameters, x):
        w_x, w_h, bias = parameters
        z = x @ w_x.T + bias

        def step(h, z):
            h = jnp.tanh(z + h @ w_h.T)
            return h, h

        last, output = jax.lax.scan(step, start, z, unroll=min(8, len(x)))
        return (last, output) if problem.cell.mode == FORWARD else last.sum()

    if problem.cell.mode == FORWARD:
        forward = jax.jit(run)
        return lambda: jax.block_until_ready(forward(parameters, x))[0]
    backward = jax.jit(jax.grad(run))
    return lambda: jax.block_until_ready(backward(parameters, x))


def _onnx_model(problem: Problem) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    weight_ih, weight_hh, bias_ih, bias_hh = problem.weights
    steps, batch, size = problem.input.shape
    hidden = len(weight_hh)
    initializers = {"W": weight_ih[None], "R": weight_hh[None]}
    initializers["B"] = np.concatenate([bias_ih, bias_hh])[None]
    graph = helper.make_graph(
        [helper.make_node("RNN", ["X", "W", "R", "B"], ["Y", "Y_h"], hidden_size=hidden)],
        "rnn",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, size])],
        [
            helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden]),
            helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, batch, hidden]),
        ],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def onnxruntime(problem: Problem, threads: int) -> Call | None:
    if problem.cell.mode == TRAINING:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_onnx_model(problem), options)
    feed = {"X": problem.input.numpy()}
    return lambda: session.run(None, feed)[1]


def openvino(problem: Problem, threads: int) -> Call | None:
    if problem.cell.mode == TRAINING:
        return None
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    model = core.compile_model(core.read_model(_onnx_model(problem), b""), "CPU", settings)
    request, x = model.create_infer_request(), problem.input.numpy()
    return lambda: request.infer([x], share_inputs=True)[1]


PEERS: dict[str, tuple[str, Peer]] = {
    "PyTorch in place": ("torch", in_place_loop),
    "NumPy": ("numpy", numpy_loop),
    "JAX": ("jax", jax_scan),
    "onnxruntime": ("onnxruntime", onnxruntime),
    "OpenVINO": ("openvino", openvino),
}


def cells(odd: bool = False, packed: bool = False) -> Iterator[Cell]:
    for mode in (FORWARD, TRAINING):
        for size, hidden, steps, batch in ODD_SHAPES if odd else SHAPES:
            yield Cell(DENSE, mode, batch, size, hidden, steps)
        for batch in PACKED_BATCHES if packed else ():
            yield Cell(PACKED, mode, batch, 64, 256, LENGTHS[1])


def gradients(layer: nn.RNN) -> list[Tensor]:
    """In the form of a peer: both biases are one there."""
    weight_ih, weight_hh, bias, _ = (p.grad for p in layer.parameters())
    return [weight_ih, weight_hh, bias]


def results(cell: Cell, call: Call, layer: nn.RNN | None = None) -> list[np.ndarray]:
    """What a call computes, for the oracle."""
    with torch.inference_mode(cell.mode == FORWARD):
        returned: Any = call()
    if layer is not None:
        returned = gradients(layer) if cell.mode == TRAINING else returned[1]
    wanted = returned if cell.mode == TRAINING else [returned]
    return [np.squeeze(np.asarray(v.detach() if isinstance(v, Tensor) else v)) for v in wanted]


def check_peer(name: str, got: list[np.ndarray], oracle: list[np.ndarray]) -> None:
    for mine, exact in zip(got, oracle, strict=True):
        error = np.abs(mine - exact.reshape(mine.shape)).max() / np.abs(exact).max()
        if not error < PEER_ERROR:
            raise gate.GateError(f"{name} is off by {error:.2g}")


def calls(cell: Cell, threads: int, names: list[str]) -> dict[str, Call]:
    """The calls of one cell, each checked."""
    torch.manual_seed(0)
    baseline = nn.RNN(cell.input_size, cell.hidden_size)
    fused = FusedRNN(cell.input_size, cell.hidden_size)
    fused.load_state_dict(baseline.state_dict())
    input = torch.randn(cell.seq_len, cell.batch, cell.input_size)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (cell.batch,))

    def layer_call(layer: nn.RNN) -> Call:
        parameters = tuple(layer.parameters())
        x = input.to(parameters[0].dtype)

        def run(given: Any) -> Any:
            return layer(given) if cell.mode == FORWARD else train(layer, parameters, given)

        if cell.family == DENSE:
            return lambda: run(x)
        return lambda: run(pack_padded_sequence(x, lengths, enforce_sorted=False))

    precise = nn.RNN(cell.input_size, cell.hidden_size, dtype=torch.float64)
    precise.load_state_dict(baseline.state_dict())
    oracle = results(cell, layer_call(precise), precise)
    layers = {BASELINE: baseline, FUSED: fused}
    found = {name: layer_call(layer) for name, layer in layers.items()}
    theirs, ours = (results(cell, found[name], layer) for name, layer in layers.items())
    gate.check(
        *({str(i): torch.from_numpy(v) for i, v in enumerate(r)} for r in (ours, theirs, oracle))
    )
    if cell.mode == FORWARD and cell.family == DENSE:
        prepacked = FusedRNN(cell.input_size, cell.hidden_size)
        prepacked.load_state_dict(baseline.state_dict())
        found[PREPACKED] = layer_call(prepacked.prepack())
        check_peer(PREPACKED, results(cell, found[PREPACKED], prepacked), oracle)
    problem = Problem(cell, baseline, input)
    for name in names if cell.family == DENSE else ():
        call = PEERS[name][1](problem, threads)
        if call is not None:
            check_peer(name, results(cell, call), oracle)
            found[name] = call
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = [
        name
        for name, (package, _) in PEERS.items()
        if importlib.util.find_spec(package) is not None and not options.odd
    ]
    budget = Budget(seconds=options.seconds, max_rounds=30, round_seconds=0.01)
    rows = []
    for cell in cells(options.odd, not options.odd):
        found = calls(cell, options.threads, names)
        with torch.inference_mode(cell.mode == FORWARD):
            rounds = race(found, budget)
        medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
        print(cell, *(f"{name} {duration(value)}" for name, value in medians.items()), sep="  ")
        for name, recorded in rounds.items():
            rows.append(
                {
                    **dataclasses.asdict(cell),
                    "peer": name,
                    "iterations": recorded.iterations,
                    "median": medians[name],
                    "seconds": [float(f"{s:.6g}") for s in recorded.seconds],
                }
            )
    return rows


def by_cell(rows: list[dict[str, Any]]) -> dict[Cell, dict[str, float]]:
    found: dict[Cell, dict[str, float]] = {}
    for row in rows:
        found.setdefault(Cell.of(row), {})[row["peer"]] = row["median"]
    return found


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """A row a cell: nn.RNN, ours, their ratio, and the best of the others."""
    lines = [["(D, H, T)", "B", BASELINE, FUSED, "speed-up", PREPACKED, "best other", "its time"]]
    ratios, beaten = [], []
    for cell, medians in by_cell(rows).items():
        if cell.mode != mode:
            continue
        ours = medians[FUSED]
        ratios.append(medians[BASELINE] / ours)
        others = {n: m for n, m in medians.items() if n not in (BASELINE, FUSED, PREPACKED)}
        best = min(others, key=others.__getitem__, default="")
        label = shape(cell)
        if cell.family == PACKED:
            label = f"({cell.input_size}, {cell.hidden_size}, {LENGTHS[0]}..{LENGTHS[1]})"
        lines.append(
            [
                *(label, str(cell.batch), duration(medians[BASELINE]), duration(ours)),
                ratio(ratios[-1]),
                duration(medians[PREPACKED]) if PREPACKED in medians else "",
                best,
                duration(others[best]) + (" ▼" if others[best] < ours else "") if best else "",
            ]
        )
        beaten += [others[best] > ours] if best else []
    if not beaten:
        lines = [line[:5] for line in lines]
    text = markdown(lines)
    text += (
        f"\n\nGeometric mean {ratio(statistics.geometric_mean(ratios))}, worst "
        f"{ratio(min(ratios))} of {BASELINE}."
    )
    if beaten:
        text += f" Faster than the best other in {sum(beaten)} of {len(beaten)} cells."
    return text


def report(document: dict[str, Any]) -> str:
    machine = document["machine"]
    introduction = (
        f"{machine['cpu']}, {machine['threads']} thread(s); torch {machine['torch']}; float32. "
        f"A word went from core to core in {1e9 * machine['hop']:.0f} ns at best, "
        f"{1e9 * machine['hop_median']:.0f} ns in the median of tries. "
        f"Others: {', '.join(document['others']) or 'none'}."
    )
    return pages.by_mode(introduction, document["rows"], table)


def main() -> None:
    parser = pages.parser(__doc__, seconds=1.0)
    parser.add_argument("--odd", action="store_true", help="odd shapes, against nn.RNN alone")
    options = parser.parse_args()
    pages.settle(options.threads)

    rows = run(options)
    others = [n for n in PEERS if any(row["peer"] == n for row in rows)]
    machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    machine["hop"], machine["hop_median"] = hop()
    document = {"machine": machine, "others": others, "rows": rows}
    name = f"{'odd' if options.odd else 'peers'}_{options.threads}"
    pages.publish(name, document, report(document), options.write)


if __name__ == "__main__":
    main()
