"""`torch.compile`, `torch.export`, AOTInductor: at most one node a layer, whatever the shape."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from namernn_fast import FusedRNN

STACK = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


class Net(torch.nn.Module):
    """A layer and a linear head, to be traced in one graph."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = FusedRNN(4, 6, **options)
        width = 12 if options.get("bidirectional") else 6
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x, hx=None):
        input = (
            x._replace(data=torch.sin(x.data)) if isinstance(x, PackedSequence) else torch.sin(x)
        )
        output, h_n = self.rnn(input, hx)
        output = output.data if isinstance(output, PackedSequence) else output
        return self.head(output).square().sum() + h_n.sum()


def packed(lengths, in_order=True):
    order = sorted(lengths, reverse=True) if in_order else lengths
    return pack_sequence([torch.randn(n, 4) for n in order], enforce_sorted=in_order)


def check(compiled, net, x, hx=None):
    """Checks that the compiled and the plain network give the same loss and gradients."""
    data = (x.data if isinstance(x, PackedSequence) else x).requires_grad_()
    results = []
    for run in (net, compiled):
        net.zero_grad()
        data.grad = None
        loss = run(x, hx)
        loss.backward()
        results.append([loss, data.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, hx), net(x, hx))


@pytest.mark.parametrize(
    "options",
    [
        STACK | {"batch_first": True},
        pytest.param({"nonlinearity": "relu"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_is_one_graph(options, dynamic):
    net = Net(**options)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for shape in ((5, 3, 4), (7, 2, 4)):
        check(compiled, net, torch.randn(shape))


def test_reduce_overhead():
    net = Net(**STACK)
    compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for hx in (None, torch.randn(4, 3, 6)):
        check(compiled, net, torch.randn(5, 3, 4), hx)


@pytest.mark.parametrize(
    ("in_order", "with_hx"),
    [
        (True, False),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [(True, True), (False, True)]
        ),
        (False, False),
    ],
)
def test_compile_packed(in_order, with_hx):
    net = Net(**STACK)
    compiled = torch.compile(net, fullgraph=True)
    check(compiled, net, packed([2, 5, 3], in_order), torch.randn(4, 3, 6) if with_hx else None)


# Sizes begin at 2, because torch itself compiles anew for a size of 1.
SIZES = [(2 + i, 21 - i) for i in range(20)]
INPUTS = {
    "dense": lambda seq_len, batch: torch.randn(seq_len, batch, 4),
    "packed": lambda seq_len, batch: packed([*range(1, seq_len)] + batch * [seq_len]),
    "packed unsorted": lambda seq_len, batch: packed(
        [*range(1, seq_len)] + batch * [seq_len], in_order=False
    ),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize(("dynamic", "compilations"), [(True, 1), (None, 2)])
def test_one_compilation_serves_every_shape(make, with_hx, dynamic, compilations):
    """The first shape compiles for all shapes with `dynamic=True`, the second one by default."""
    net = Net(**STACK)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in SIZES:
        x = make(*size)
        batch = x.batch_sizes[0] if isinstance(x, PackedSequence) else x.shape[1]
        compiled(x, torch.randn(4, batch, 6) if with_hx else None).backward()
    assert counters["stats"]["unique_graphs"] == compilations


@pytest.mark.parametrize(
    ("make", "with_hx"),
    [("dense", True), ("dense", False), ("packed", True), ("packed unsorted", False)],
)
def test_nothing_breaks_the_graph(make, with_hx):
    """The graph is whole without `fullgraph=True` as well."""
    hx = torch.randn(4, 8, 6) if with_hx else None
    found = torch._dynamo.explain(FusedRNN(4, 6, **STACK))(
        INPUTS[make](6, 8 if make == "dense" else 3), hx
    )
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    assert found.op_count > 1


def own_nodes(graph):
    return [node for node in graph.nodes if str(node.target).startswith("namernn_fast.")]


def test_the_graph_does_not_grow_with_the_sequence():
    sizes = []
    for seq_len in (5, 500):
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        net = Net(**STACK)
        torch.compile(net, fullgraph=True, backend=backend)(torch.randn(seq_len, 3, 4)).backward()
        graphs = [backend.fw_graphs[0].graph, backend.bw_graphs[0].graph]
        assert all(0 < len(own_nodes(graph)) <= 2 for graph in graphs)
        sizes.append([len(graph.nodes) for graph in graphs])
    assert sizes[0] == sizes[1]


def exported(module, with_hx):
    """Returns `module` exported at one shape, with batch and time left open."""
    seq_len, batch = Dim("seq_len"), Dim("batch")
    x = {0: batch, 1: seq_len} if module.batch_first else {0: seq_len, 1: batch}
    arguments, dims = (torch.randn(5, 3, 4),), (x,)
    if with_hx:
        hx = torch.randn(module.num_layers * 2, 5 if module.batch_first else 3, 6)
        arguments, dims = (*arguments, hx), (x, {1: batch})
    return torch.export.export(module, arguments, dynamic_shapes=dims)


@pytest.mark.parametrize("options", [STACK, STACK | {"batch_first": True, "bias": False}])
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(options, with_hx, training, tmp_path):
    module = FusedRNN(4, 6, **options).train(training)
    program = exported(module, with_hx)
    assert 0 < len(own_nodes(program.graph)) <= 4
    assert len(own_nodes(program.run_decompositions().graph)) == len(own_nodes(program.graph))
    torch.export.save(program, tmp_path / "rnn.pt2")
    loaded = torch.export.load(tmp_path / "rnn.pt2").module()
    for shape in ((2, 9, 4), (50, 2, 4), (3, 70, 4)):
        x = torch.randn(shape)
        batch = shape[0 if module.batch_first else 1]
        arguments = (x, torch.randn(4, batch, 6)) if with_hx else (x,)
        torch.testing.assert_close(loaded(*arguments), module(*arguments), rtol=0, atol=0)


class OnRows(torch.nn.Module):
    """A layer on the parts of a packed sequence, which `torch.export` takes."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, data, batch_sizes):
        output, h_n = self.rnn(PackedSequence(data, batch_sizes))
        return output.data, h_n


def test_export_packed():
    module = OnRows(FusedRNN(4, 6, **STACK))
    data, batch_sizes, *_ = packed([5, 3, 2])
    program = torch.export.export(
        module, (data, batch_sizes), dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    )
    assert 0 < len(own_nodes(program.graph)) <= 4
    for lengths in ([7, 6, 3, 2], [9], [4] * 20):
        data, batch_sizes, *_ = packed(lengths)
        torch.testing.assert_close(
            program.module()(data, batch_sizes), module(data, batch_sizes), rtol=0, atol=0
        )


def test_aot_inductor(tmp_path):
    """A network compiled ahead of time runs in a process that imported `namernn_fast`."""
    module = FusedRNN(4, 6, **STACK).eval().requires_grad_(False)
    package = torch._inductor.aoti_compile_and_package(
        exported(module, with_hx=False), package_path=str(tmp_path / "rnn.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for shape in ((2, 9, 4), (50, 2, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(tuple(loaded(x)), module(x))
    torch.save((x, module(x)), tmp_path / "call.pt")
    program = f"""
import torch
import namernn_fast
x, wanted = torch.load({str(tmp_path / "call.pt")!r})
loaded = torch._inductor.aoti_load_package({package!r})
torch.testing.assert_close(tuple(loaded(x)), wanted)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dynamo_first", [True, False])
def test_only_ours_is_traced(dynamo_first):
    """Whichever is imported first, FusedRNN is traced and `nn.RNN` breaks the graph as before."""
    program = f"""
import torch
{"import torch._dynamo" if dynamo_first else ""}
import namernn_fast
x = torch.randn(3, 2, 4)
compiled = torch.compile(namernn_fast.FusedRNN(4, 5), fullgraph=True, backend="eager")
print(compiled(x)[0].shape)
try:
    torch.compile(torch.nn.RNN(4, 5), fullgraph=True, backend="eager")(x)
except torch._dynamo.exc.Unsupported:
    print("refused as before")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "torch.Size([3, 2, 5])" in ran.stdout
    assert "refused as before" in ran.stdout


@pytest.mark.parametrize("forward", [False, True], ids=["eager", "compiled"])
def test_compiled_autograd(forward):
    """The backward pass of either forward pass can be compiled as autograd runs it."""
    module, x = FusedRNN(3, 4, 2), torch.randn(5, 2, 3)
    wanted = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    run = torch.compile(module, backend="aot_eager") if forward else module
    output, _ = run(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [*wanted])
