"""What `nn.RNN` and `FusedRNN` can do on the CPU: every row of the table is tried, not claimed.

python -m benchmarks.capabilities [--write]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from benchmarks.harness.grid import BASELINE, FUSED
from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import README
from benchmarks.harness.race import Budget, race
from namernn_fast import FusedRNN, reference

LAYERS: dict[str, type[torch.nn.RNN]] = {BASELINE: torch.nn.RNN, FUSED: FusedRNN}
SECONDS = 120
WORDS = 48  # letters of a reason

Try = Callable[[type[torch.nn.RNN]], str | None]


@dataclass
class Row:
    attempt: Try
    slow: bool


ROWS: dict[str, Row] = {}


def row(label: str, slow: bool = False) -> Callable[[Try], Try]:
    """Registers a try: it raises, or asserts a wrong result, where a layer class cannot do it.

    What it returns, if anything, is worth knowing where it can.
    """

    def register(attempt: Try) -> Try:
        ROWS[label] = Row(attempt, slow)
        return attempt

    return register


def same(actual, wanted) -> None:
    torch.testing.assert_close(actual, wanted, msg="wrong results")


def packed(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.randn(n, 4) for n in lengths], enforce_sorted=False)


def loss_of(result) -> Tensor:
    output, h_n = result
    output = output.data if isinstance(output, PackedSequence) else output
    return output.square().sum() + h_n.sum()


@row("`torch.compile(fullgraph=True)`, forward and backward")
def _(layer_class):
    layer = layer_class(4, 5)
    x = torch.randn(6, 3, 4)
    loss = loss_of(torch.compile(layer, fullgraph=True, backend="aot_eager")(x))
    loss.backward()
    same(loss, loss_of(layer(x)))


@row("one compilation for all lengths and batches, packed too")
def _(layer_class):
    layer = layer_class(4, 5)
    for make in (lambda n: torch.randn(n, n + 1, 4), lambda n: packed(*range(1, n + 1))):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in range(2, 12):
            loss_of(compiled(make(n))).backward()
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compilations == 1, f"{compilations} compilations"


def exported(layer: torch.nn.Module) -> torch.export.ExportedProgram:
    dims = {0: torch.export.Dim("seq_len"), 1: torch.export.Dim("batch")}
    return torch.export.export(layer, (torch.randn(6, 3, 4),), dynamic_shapes=(dims,))


@row("`torch.export` with any length and batch")
def _(layer_class):
    layer = layer_class(4, 5)
    x = torch.randn(9, 7, 4)
    same(exported(layer).module()(x), layer(x))


@row("AOTInductor package of the same", slow=True)
def _(layer_class):
    layer = layer_class(4, 5).requires_grad_(False)
    x = torch.randn(9, 7, 4)
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(
            exported(layer), package_path=f"{folder}/rnn.pt2"
        )
        same(tuple(torch._inductor.aoti_load_package(package)(x)), layer(x))


@row("ONNX `RNN` nodes, any length and batch (`dynamo=True`)")
def _(layer_class):
    dims = {0: torch.export.Dim("seq_len"), 1: torch.export.Dim("batch")}
    program = torch.onnx.export(
        layer_class(4, 5), (torch.randn(6, 3, 4),), dynamo=True, dynamic_shapes=(dims,)
    )
    graph = program.model_proto.graph
    assert any(node.op_type == "RNN" for node in graph.node), "unrolled for one length"


@row("`lengths=` in place of packing, also of sequences without a step")
def _(layer_class):
    layer = layer_class(4, 5)
    x, hx = torch.randn(6, 3, 4), torch.randn(1, 3, 5)
    output, h_n = layer(x, hx, lengths=torch.tensor([2, 6, 0]))
    for b, length in ((0, 2), (1, 6)):
        wanted, last = layer(x[:length, b : b + 1], hx[:, b : b + 1])
        same((output[:length, b : b + 1], h_n[:, b : b + 1]), (wanted, last))
    same((output[:, 2], h_n[:, 2]), (torch.zeros(6, 5), hx[:, 2]))


@row("`reset=`: a fresh state within a sequence")
def _(layer_class):
    layer = layer_class(4, 5)
    x, reset = torch.randn(6, 3, 4), torch.zeros(6, 3, dtype=torch.bool)
    reset[2, 1] = True
    output, _ = layer(x, reset=reset)
    same(output[2:, 1:2], layer(x[2:, 1:2])[0])


@row("jagged nested tensors")
def _(layer_class):
    layer = layer_class(4, 5, batch_first=True)
    parts = [torch.randn(n, 4) for n in (3, 6, 2)]
    output, _ = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for got, part in zip(output.unbind(), parts, strict=True):
        same(got, layer(part)[0])


@row("`vmap` over inputs")
def _(layer_class):
    layer = layer_class(4, 5)
    x = torch.randn(2, 6, 3, 4)
    same(vmap(lambda x: layer(x)[0])(x), torch.stack([layer(own)[0] for own in x]))


@row("`vmap` over models (`stack_module_state`)")
def _(layer_class):
    layers = [layer_class(4, 5) for _ in range(3)]
    weights, _ = stack_module_state(layers)
    x = torch.randn(6, 3, 4)
    got = vmap(lambda weights: functional_call(layers[0], weights, (x,))[0])(weights)
    same(got, torch.stack([layer(x)[0] for layer in layers]))


@row("per-sample gradients, `vmap(grad(...))`")
def _(layer_class):
    layer = layer_class(4, 5)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return loss_of(functional_call(layer, weights, (x,)))

    x = torch.randn(3, 6, 4)
    got = vmap(grad(loss), (None, 0))(weights, x)
    wanted = [grad(loss)(weights, own) for own in x]
    same(got, {name: torch.stack([each[name] for each in wanted]) for name in weights})


@row("forward mode: `jacfwd`, `hessian`")
def _(layer_class):
    layer = layer_class(4, 5)
    x = torch.randn(6, 3, 4)
    jacfwd(lambda x: layer(x)[0])(x)
    hessian(lambda x: loss_of(layer(x)))(x)


@row("forward mode of packed sequences")
def _(layer_class):
    layer = layer_class(4, 5)
    data, *rest = packed(3, 6, 2)
    jacfwd(lambda data: layer(PackedSequence(data, *rest))[1])(data)


@row("double backward, dense and packed")
def _(layer_class):
    layer = layer_class(4, 5)
    for x in (torch.randn(6, 3, 4), packed(3, 6, 2)):
        data = (x.data if isinstance(x, PackedSequence) else x).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(layer(x)), data, create_graph=True)
        gradient.square().sum().backward()


@row("gradients in `eval()`, those of `train()`")
def _(layer_class):
    layer = layer_class(4, 5, num_layers=2)
    found = []
    for training in (True, False):
        x = torch.ones(6, 3, 4, requires_grad=True)
        loss_of(layer.train(training)(x)).backward()
        found.append(x.grad)
    same(*found)


@row("`torch.autocast`, bfloat16 and float16 layers")
def _(layer_class):
    x = torch.randn(6, 3, 4)
    layers = [layer_class(4, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    losses = [loss_of(layer(x.to(layer.weight_ih_l0.dtype))) for layer in layers]
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(loss_of(layer_class(4, 5)(x)))
    for loss in losses:
        loss.backward()


@row("float32 `hx` with a bfloat16 layer, and the reverse")
def _(layer_class):
    for own, other in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        layer = layer_class(4, 5, dtype=own)
        hx = torch.randn(1, 3, 5, dtype=other)
        x = torch.randn(6, 3, 4, dtype=own)
        same(layer(x, hx), layer(x, hx.to(own)))


@row("batch-invariant bits (`batch_invariant=True`)")
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
            Budget(0.5, max_rounds=50, round_seconds=0.005),
        )
    usual, invariant = (statistics.median(r.seconds) for r in rounds.values())
    return f"one short sequence by itself takes {invariant / usual:.1f} times as long"


@row("a sequence of 200,000 steps")
def _(layer_class):
    layer, x = layer_class(1, 1).requires_grad_(False), torch.randn(200_000, 1, 1)
    output, _ = layer(x)
    _, halfway = layer(x[:100_000])
    same(layer(x[100_000:], halfway)[0], output[100_000:])


@row("construction on `meta`, then `to_empty`")
def _(layer_class):
    with torch.device("meta"):
        layer = layer_class(4, 5)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer(torch.randn(6, 3, 4))


@row("construction by `skip_init`")
def _(layer_class):
    torch.nn.utils.skip_init(layer_class, 4, 5)


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
        before = layer(x)[0]
        change(layer)
        result = layer(x)
        assert not torch.equal(result[0], before), "the old weights are used"
        loss_of(result).backward()


@row("`DistributedDataParallel`, `fully_shard`")
def _(layer_class):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    with tempfile.TemporaryDirectory() as folder:
        init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
        sharded = fully_shard(layer_class(4, 5), mesh=init_device_mesh("cpu", (1,)))
        for layer in (DistributedDataParallel(layer_class(4, 5)), sharded):
            loss_of(layer(torch.randn(6, 3, 4))).backward()
            torch.optim.SGD(layer.parameters()).step()
        destroy_process_group()


@row("`torch.jit.script`")
def _(layer_class):
    torch.jit.script(layer_class(4, 5))


def reason(error: BaseException) -> str:
    """The first words of an error, fit for a cell."""
    words = " ".join(str(error).split()).replace("|", "/").replace("<", "&lt;")
    if len(words) > WORDS:
        words = words[:WORDS].rsplit(" ", 1)[0].rstrip(",.:;") + " …"
    if isinstance(error, AssertionError):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def child(label: str, name: str, answers) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = []  # calls of ours that went through ATen operators, step by step
    by_steps = reference.rnn_stack
    reference.rnn_stack = lambda *arguments: steps.append(label) or by_steps(*arguments)
    try:
        note = ROWS[label].attempt(LAYERS[name])
    except Exception as error:
        answers.send(f"no ({reason(error)})")
    else:
        note = "ATen operators, step by step" if steps else note
        answers.send(f"yes ({note})" if note else "yes")


def cell(label: str, name: str) -> str:
    """`yes` or `no`, and what there is to say of it, from a try in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["namernn_fast"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(label, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return f"no (not within {SECONDS} s)"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"no (the process ended with {process.exitcode})"
    finally:
        process.kill()


def table(labels: list[str]) -> str:
    lines = [f"| on a CPU | {BASELINE} | {FUSED} |", "| --- | --- | --- |"]
    for label in labels:
        lines.append("| " + " | ".join((label, *(cell(label, name) for name in LAYERS))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capabilities")
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    text = table([*ROWS])
    print(text)
    if options.write:
        write_section(README, "capabilities", text)


if __name__ == "__main__":
    main()
