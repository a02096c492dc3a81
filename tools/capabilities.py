"""Tests what torch's layers and the fused layers can do on a CPU, and writes a table.

    python -m tools.capabilities [--record]

Each verdict is the result of an actual attempt. The reason for a "no" is written by hand next to
the attempt, because an exception's message rarely explains it.
"""

import inspect
import itertools
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_map

from benchmarks.harness import pages
from benchmarks.harness.paths import CAPABILITIES
from benchmarks.harness.precision import precision_of_products
from namernn_fast import EquationLayer, FusedLeakyRNN, explain, recurrent_cell, reference
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimeBudget, race
from namernn_fast.bench.timed_calls import CLASSES, tensors_in
from namernn_fast.bench.workloads import LAYERS_OF


@recurrent_cell(gates=2)
def minimal_gated(x, u, h):
    """A minimal gated unit, which stands for all cells that users write as equations."""
    f = torch.sigmoid(x[0] + u[0])
    n = torch.tanh(x[1] + f * u[1])
    return n + f * (h - n)


LayerClass = Callable[..., torch.nn.RNNBase]
"""A layer class or, for a cell written as an equation, the method that makes its layers."""
TORCH: dict[str, LayerClass] = {
    LAYERS_OF[cell].baseline: theirs for cell, (theirs, _) in CLASSES.items()
}
"""Torch's layer classes by name."""
CUSTOM: dict[str, LayerClass] = {
    "FusedLeakyRNN": FusedLeakyRNN,
    "EquationLayer": minimal_gated.layer,
}
"""The fused layer classes that have no counterpart in torch, by name."""
FUSED: dict[str, LayerClass] = {
    **{LAYERS_OF[cell].fused: ours for cell, (_, ours) in CLASSES.items()},
    **CUSTOM,
}
"""The fused layer classes by name."""
LAYERS = TORCH | FUSED
SECONDS = 1200
"""Time limit of an attempt. It is long because one attempt compiles C++."""
YES, STEPS, NO = "yes", "ATen", "no"
"""The verdicts. STEPS: a fused layer succeeds, but runs ATen operators step by step."""


class Row(NamedTuple):
    """A row of the table of capabilities."""

    attempt: Callable[..., str | None]
    why_not: dict[str, str]
    """The reason why a layer class fails, by the name of the class."""
    slow: bool


ROWS: dict[str, Row] = {}


def row(
    label: str,
    without: str = "",
    *,
    lstm: str = "",
    ours: str = "",
    custom: str = "",
    slow: bool = False,
) -> Callable[[Callable[..., str | None]], None]:
    """Registers an attempt, which raises if a layer class cannot do what the row says.

    An attempt may have three parameters: `layer_class`; `layer`, which has 4 features and 5 hidden
    units; and `x`, an input of 6 steps and 3 sequences. An attempt that succeeds may return a note
    for the table.

    Args:
        label: The first entry of the row.
        without: Why torch's layers fail.
        lstm: Why `nn.LSTM` fails, if torch's other layers succeed.
        ours: Why the fused layers fail.
        custom: Why the layers in `CUSTOM` fail, if the other fused layers succeed.
        slow: Whether the attempt takes seconds, because it compiles or exports a program.
    """

    def register(attempt: Callable[..., str | None]) -> None:
        reasons = dict.fromkeys(TORCH, without) | {"nn.LSTM": lstm or without}
        reasons |= dict.fromkeys(FUSED, ours) | dict.fromkeys(CUSTOM, custom or ours)
        ROWS[label] = Row(attempt, reasons, slow)

    return register


def same(actual, wanted) -> None:
    torch.testing.assert_close(actual, wanted, msg="wrong results")


def packed(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=False)


def loss_of(result) -> Tensor:
    output, *states = tensors_in(result)
    return output.square().sum() + sum(state.sum() for state in states)


def random_states(layer: torch.nn.RNNBase, batch: int, dtype: torch.dtype | None = None):
    """Returns random initial states: a pair for an LSTM or a leaky layer, otherwise one tensor."""
    pair = torch.randn(2, 1, batch, layer.hidden_size, dtype=dtype).unbind()
    return pair if isinstance(layer, (torch.nn.LSTM, FusedLeakyRNN)) else pair[0]


@row(
    "`torch.compile(fullgraph=True)`, forward and backward",
    "by default, `torch.compile` does not trace torch's layers",
    slow=True,
)
def _(layer, x):
    loss = loss_of(torch.compile(layer, fullgraph=True, backend="aot_eager")(x))
    loss.backward()
    same(loss, loss_of(layer(x)))


@row(
    "one compilation for all lengths and batches, packed too",
    "by default, `torch.compile` does not trace torch's layers",
    slow=True,
)
def _(layer):
    for make in (lambda n: torch.randn(n, n + 1, 4), lambda n: packed(*range(1, n + 1))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in range(2, 12):
            loss_of(compiled(make(n))).backward()
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compilations == 1, f"{compilations} compilations"


ANY_LENGTH_AND_BATCH = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)


@row("`torch.export` with any length and batch", "the exported program has one fixed length")
def _(layer, x):
    program = torch.export.export(layer, (x,), dynamic_shapes=ANY_LENGTH_AND_BATCH)
    longer = torch.randn(9, 7, 4)
    same(program.module()(longer), layer(longer))


@row("AOTInductor package of that program", "the exported program has one fixed length", slow=True)
def _(layer, x):
    layer.requires_grad_(False)
    program = torch.export.export(layer, (x,), dynamic_shapes=ANY_LENGTH_AND_BATCH)
    longer = torch.randn(9, 7, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/rnn.pt2")
        same(tuple(torch._inductor.aoti_load_package(path)(longer)), layer(longer))


@row(
    "ONNX `RNN`, `GRU` or `LSTM` nodes, any length and batch (`dynamo=True`)",
    "the steps are unrolled for one fixed length",
    custom="ONNX has no such node",
    slow=True,
)
def _(layer, x):
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=ANY_LENGTH_AND_BATCH)
    graph = program.model_proto.graph
    op_type = layer.mode.partition("_")[0]  # RNN, if the mode is RNN_TANH
    assert any(node.op_type == op_type for node in graph.node), "unrolled for one length"


@row("`lengths=` instead of packing, sequences of length 0 included", "no such argument")
def _(layer, x):
    hx = random_states(layer, 3)
    output, last = layer(x, hx, lengths=torch.tensor([2, 6, 0]))
    for b, length in ((0, 2), (1, 6)):
        initial, final = tree_map(lambda s, b=b: s[:, b : b + 1], (hx, last))
        same((output[:length, b : b + 1], final), layer(x[:length, b : b + 1], initial))
    initial, final = tree_map(lambda s: s[:, 2], (hx, last))
    same((output[:, 2], final), (torch.zeros(6, 5), initial))


RESET = torch.zeros(6, 3, dtype=torch.bool)
RESET[2, 1] = True


@row("`reset=`: a zero state within a sequence", "no such argument")
def _(layer, x):
    output, _ = layer(x, reset=RESET)
    same(output[2:, 1:2], layer(x[2:, 1:2])[0])


@row("`reset_to=`: a given state within a sequence", "no such argument")
def _(layer, x):
    states = random_states(layer, 3)
    output, _ = layer(x, reset=RESET, reset_to=tree_map(lambda s: s.expand(6, 1, 3, 5), states))
    same(output[2:, 1:2], layer(x[2:, 1:2], tree_map(lambda s: s[:, 1:2], states))[0])


@row("`proj_size`: h has fewer features than hidden_size", "LSTMs only", ours="LSTMs only")
def _(layer_class, x):
    layer = layer_class(4, 5, proj_size=2)
    output, _ = layer(x)
    assert output.shape == (6, 3, 2)
    same(output[3:], layer(x[3:], layer(x[:3])[1])[0])


@row("jagged nested tensors", "torch's operator does not take nested tensors")
def _(layer_class):
    layer = layer_class(4, 5, batch_first=True)
    parts = [torch.randn(n, 4) for n in (3, 6, 2)]
    output, _ = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(output.unbind(), parts, strict=True):
        same(got, layer(part)[0])


IDS = torch.tensor([[3, 1, 3], [0, 2, 3], [2, 2, 1], [4, 0, 4]])  # (seq_len, batch)


@row("token ids and an embedding as input (`embedding=`)", "no such argument")
def _(layer):
    embedding = torch.randn(5, 4, requires_grad=True)
    got = layer(IDS, embedding=embedding)
    wanted = layer(torch.nn.functional.embedding(IDS, embedding))
    same(got, wanted)
    same(*(torch.autograd.grad(loss_of(result), embedding) for result in (got, wanted)))


@row(
    "`torch.compile` and `torch.export` of token ids, any number of them",
    "no such argument",
    slow=True,
)
def _(layer):
    embedding = {"embedding": torch.randn(5, 4)}
    shapes = {"input": ANY_LENGTH_AND_BATCH[0], "embedding": None}
    program = torch.export.export(layer, (IDS,), embedding, dynamic_shapes=shapes).module()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for ids in (IDS, IDS[:2, :2], IDS.repeat(3, 2)):
        same(program(ids, **embedding), layer(ids, **embedding))
        same(compiled(ids, **embedding), layer(ids, **embedding))


@row("only the last state, without an output (`last_state()`)", "no such method")
def _(layer, x):
    same(layer.last_state(x), layer(x)[1])


@row("weights packed once, for inference (`prepare()`)", "no such method")
def _(layer_class, layer, x):
    prepared = layer.prepare()
    same(prepared(x), layer(x))
    layer.load_state_dict(layer_class(4, 5).state_dict())
    prepared.refresh(layer)
    same(prepared(x), layer(x))


@row("8-bit weights, for inference (`prepare(torch.int8)`)", "no such method")
def _(layer, x):
    got, wanted = layer.prepare(torch.int8)(x)[0], layer(x)[0]
    assert (got - wanted).abs().max() < 0.03


@row("a step at a time, with states kept between calls (`prepare().stream()`)", "no such method")
def _(layer, x):
    stream = layer.prepare().stream(x.shape[1])
    same(torch.stack([stream(frame) for frame in x]), layer(x)[0])


@row("sharing prefixes of token ids, in training too", "no such method")
def _(layer_class):
    layer, embedding = layer_class(4, 40), torch.randn(5, 4, requires_grad=True)
    leaves = [embedding, *(weight for weight in layer.parameters() if weight.requires_grad)]
    found = []
    for share in (True, False):
        last = layer.last_state(IDS, embedding=embedding, share_prefixes=share)
        states = last if isinstance(last, tuple) else (last,)
        loss = sum(state.square().sum() for state in states)
        found.append([*states, *torch.autograd.grad(loss, leaves)])
    same(*found)


@row("`vmap` over inputs", "torch's operator has no batching rule")
def _(layer):
    inputs = torch.randn(2, 6, 3, 4)
    same(vmap(lambda x: layer(x)[0])(inputs), torch.stack([layer(x)[0] for x in inputs]))


@row("`vmap` over models (`stack_module_state`)", "torch's operator has no batching rule")
def _(layer_class, x):
    layers = [layer_class(4, 5) for _ in range(3)]
    weights, _ = stack_module_state(layers)
    got = vmap(lambda weights: functional_call(layers[0], weights, (x,))[0])(weights)
    same(got, torch.stack([layer(x)[0] for layer in layers]))


@row(
    "per-sample gradients, `vmap(grad(...))`",
    "torch's operator writes in place where `vmap` cannot",
)
def _(layer):
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return loss_of(functional_call(layer, weights, (x,)))

    samples = torch.randn(3, 6, 4)
    got = vmap(grad(loss), (None, 0))(weights, samples)
    wanted = [grad(loss)(weights, x) for x in samples]
    same(got, {name: torch.stack([grads[name] for grads in wanted]) for name in weights})


@row("forward mode: `jacfwd`, `hessian`", lstm="oneDNN's operator has no forward derivative")
def _(layer, x):
    jacfwd(lambda x: layer(x)[0])(x)
    hessian(lambda x: loss_of(layer(x)))(x)


@row(
    "forward mode of packed sequences",
    "torch's operator for packed sequences reads the memory of its input, which transforms hide",
)
def _(layer):
    data, *rest = packed(3, 6, 2)
    jacfwd(lambda data: layer(PackedSequence(data, *rest))[1])(data)


@row("double backward, dense and packed")
def _(layer, x):
    sequences = packed(3, 6, 2)
    for input, leaf in ((x, x), (sequences, sequences.data)):
        leaf.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(layer(input)), leaf, create_graph=True)
        gradient.square().sum().backward()


@row("several gradients at once: `jacobian(vectorize=True)`, `is_grads_batched=True`")
def _(layer, x):
    jacobian = torch.autograd.functional.jacobian
    same(*(jacobian(lambda x: layer(x)[1], x, vectorize=batched) for batched in (True, False)))


@row("gradients in `eval()`, equal to those in `train()`")
def _(layer_class, x):
    layer, x = layer_class(4, 5, num_layers=2), x.requires_grad_()
    losses = [loss_of(layer.train(training)(x)) for training in (True, False)]
    same(*(torch.autograd.grad(loss, x) for loss in losses))


@row("`torch.autocast`, bfloat16 and float16 layers")
def _(layer_class, layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(layer(x)).backward()
    for dtype in (torch.bfloat16, torch.float16):
        loss_of(layer_class(4, 5, dtype=dtype)(x.to(dtype))).backward()


@row(
    "`torch.set_float32_matmul_precision` on a CPU, and a report of whether it applies",
    "nothing reports it",
)
def _(layer, x):
    with precision_of_products("medium"):
        assert "products" in str(explain(layer, x))


@row("float32 `hx` with a bfloat16 layer, and the reverse", "`hx` must have the dtype of the layer")
def _(layer_class, x):
    for dtype, other in itertools.permutations((torch.bfloat16, torch.float32)):
        layer, input = layer_class(4, 5, dtype=dtype), x.to(dtype)
        hx = random_states(layer, 3, other)
        converted = tree_map(lambda state, dtype=dtype: state.to(dtype), hx)
        same(layer(input, hx), layer(input, converted))


@row("batch-invariant bits (`batch_invariant=True`)", "no such argument")
def _(layer_class):
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_class(64, 100, batch_invariant=True, dtype=dtype)
        x = torch.randn(8, 50, 64, dtype=dtype)
        output, _ = layer(x)
        for b in (1, 3):
            assert torch.equal(output[:, :b], layer(x[:, :b])[0]), "other bits in another batch"
    x = torch.randn(8, 1, 64)
    layers = {flag: layer_class(64, 256, batch_invariant=flag) for flag in (False, True)}
    with torch.inference_mode():
        rounds = race(
            {str(flag): lambda layer=layer: layer(x) for flag, layer in layers.items()},
            TimeBudget(0.5, max_rounds=50, round_seconds=0.005),
        )
    usual, invariant = (statistics.median(r.seconds) for r in rounds.values())
    return f"one short sequence takes {invariant / usual:.1f} times as long"


@row("a sequence of 200,000 steps")
def _(layer_class):
    layer, x = layer_class(1, 1).requires_grad_(False), torch.randn(200_000, 1, 1)
    output, _ = layer(x)
    _, halfway = layer(x[:100_000])
    same(layer(x[100_000:], halfway)[0], output[100_000:])


@row("construction on `meta`, then `to_empty`")
def _(layer_class, x):
    with torch.device("meta"):
        layer = layer_class(4, 5)
    layer.to_empty(device="cpu").reset_parameters()
    layer(x)


@row("construction by `skip_init`", "the signature of torch's classes does not show `device`")
def _(layer):
    more = {"cell": minimal_gated} if isinstance(layer, EquationLayer) else {}
    torch.nn.utils.skip_init(type(layer), 4, 5, **more)


@row("`weight_norm`, `spectral_norm`, pruning, tied weights, writes to `.data`")
def _(layer_class):
    def rescale_norm(layer):
        parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.data.mul_(2)

    x = torch.randn(6, 3, 5)
    for change in (
        rescale_norm,
        lambda layer: parametrizations.spectral_norm(layer, "weight_hh_l0"),
        lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
        lambda layer: setattr(layer, "weight_ih_l0", layer.weight_hh_l0),
        lambda layer: layer.weight_hh_l0.data.mul_(2),
    ):
        layer = layer_class(5, 5)
        old_output = layer(x)[0]
        change(layer)
        result = layer(x)
        assert not torch.equal(result[0], old_output), "the old weights are used"
        loss_of(result).backward()


@row("`DistributedDataParallel`, `fully_shard`")
def _(layer_class, layer, x):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    with tempfile.TemporaryDirectory() as folder:
        init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
        sharded = fully_shard(layer_class(4, 5), mesh=init_device_mesh("cpu", (1,)))
        for model in (DistributedDataParallel(layer), sharded):
            loss_of(model(x)).backward()
            torch.optim.SGD(model.parameters()).step()
        destroy_process_group()


@row(
    "`torch.jit.script`, `torch.jit.trace` at any length",
    custom="`torch.jit.script` compiles only subclasses of torch's layers",
)
def _(layer, x):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    longer = torch.randn(9, 2, 4)
    for compiled in (torch.jit.script(Model()), torch.jit.trace(Model(), x)):
        same(compiled(longer), layer(longer))
        loss_of(compiled(longer)).backward()


@row("a leaf of `torch.fx` graphs")
def _(layer):
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(layer)).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


NO_COPY = "the gradient is computed from `output`, and no copy is kept"


@row("an in-place change of `output` before its gradient is computed", lstm=NO_COPY, ours=NO_COPY)
def _(layer, x):
    output, _ = layer(x)
    output.relu_().sum().backward()


def child(label: str, name: str, answers: Connection) -> None:
    """Runs an attempt, and sends its verdict with a note or an error message."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = []  # calls of a fused layer that used ATen operators
    run_stack = reference.run_stack
    reference.run_stack = lambda call: calls.append(label) or run_stack(call)
    attempt, layer_class = ROWS[label].attempt, LAYERS[name]
    arguments = {"layer_class": layer_class, "layer": layer_class(4, 5), "x": torch.randn(6, 3, 4)}
    try:
        note = attempt(**{key: arguments[key] for key in inspect.signature(attempt).parameters})
    except Exception as error:
        answers.send((NO, f"{type(error).__name__}: {error}"))
    else:
        answers.send((STEPS if calls else YES, note or ""))


def attempt(label: str, name: str) -> tuple[str, str]:
    """Runs a row's attempt for one layer class, in a separate process.

    Returns:
        The verdict, and a note or, for a "no", the error message.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["namernn_fast", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(label, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return NO, f"not within {SECONDS} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return NO, f"the process exited with {process.exitcode}"
    finally:
        process.kill()


def entry(label: str, name: str) -> tuple[str, str]:
    """Returns the verdict for one row and layer class, and a note or the reason for a "no"."""
    verdict, text = attempt(label, name)
    if verdict == NO:
        why_not = ROWS[label].why_not[name]
        if not why_not:
            raise SystemExit(f"{label}: {name} failed, but the row gives no reason: {text}")
        text = why_not
    return verdict, text


def names_by_text(texts: dict[str, str]) -> dict[str, list[str]]:
    """Returns the layer classes with each text."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    return names


def note_of(entries: dict[str, tuple[str, str]]) -> str:
    """Returns the last column of a row: all notes, without repetitions.

    A note names its layers, unless the row has only one note.

    Args:
        entries: the verdict and the note of each layer class.
    """
    names = names_by_text({name: text for name, (_, text) in entries.items() if text})
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(layers)}: {text}" for text, layers in names.items())


def merged(verdicts: dict[str, str]) -> str:
    """Returns the verdicts as text: one word, or the layers for which each word holds."""
    layers = names_by_text(verdicts)
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in layers.items())


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def kernels() -> str:
    """Returns the paths of float32 calls of the fused layers, usually a single one."""
    x = torch.randn(6, 3, 4)
    paths = {explain(layer_class(4, 5), x).path for layer_class in FUSED.values()}
    return ", ".join(f"`{path}`" for path in sorted(paths))


def main() -> None:
    options = pages.parse(pages.parser(__doc__))
    header = ("on a CPU", "torch's layers", "fused layers", "note")
    lines = [f"{cpu_name()}; torch {torch.__version__}; fused layers on {kernels()}.", ""]
    lines += [table_row(*header), table_row(*["---"] * len(header))]
    for label in ROWS:
        entries = {name: entry(label, name) for name in LAYERS}
        columns = (merged({name: entries[name][0] for name in names}) for names in (TORCH, FUSED))
        lines.append(table_row(label, *columns, note_of(entries)))
        print(lines[-1], flush=True)
    folder, text = pages.folder_of(record=False), "\n".join(lines)
    pages.announce(pages.write_text(folder, "capabilities", text, options.record, CAPABILITIES))


if __name__ == "__main__":
    main()
