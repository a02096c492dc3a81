"""Tests that graphs of `torch.compile`, `torch.export` and AOTInductor work for every shape."""

import pytest
import torch
import torch.nn.functional as F
from kinds import DROP_INS, VARIANTS, for_variants, kind_of, tensors_in
from layouts import tensors_of
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves
from wrappers import OnRows, WithLengths

from namernn_fast.call.tokens import TRACED_VOCABULARY

STACK = {"num_layers": 2, "bidirectional": True}
# The vocabulary size. Only the first batch in SIZES has fewer ids than this, so eager calls would
# gather embedding rows for the first batch and use a table for the others.
V = 30
FEATURES = {
    "dense": lambda seq_len, batch: torch.randn(seq_len, batch, 4),
    "packed": lambda seq_len, batch: packed([*range(1, seq_len)] + batch * [seq_len]),
    "packed unsorted": lambda seq_len, batch: packed(
        [*range(1, seq_len)] + batch * [seq_len], in_order=False
    ),
}
IDS = {
    "ids": lambda seq_len, batch: torch.randint(V, (seq_len, batch)),
    "packed ids": lambda seq_len, batch: pack_sequence(
        [torch.randint(V, (n,)) for n in (*range(1, seq_len), *[seq_len] * batch)],
        enforce_sorted=False,
    ),
}
INPUTS = FEATURES | IDS
# Sizes start at 2 because torch recompiles for a size of 1.
SIZES = [(5, 3), *((2 + i, 20 - i) for i in range(0, 19, 3))]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


class Net(torch.nn.Module):
    """Computes a loss from a model's last states, and from its output if `with_output` is true."""

    def __init__(self, model, with_output=True):
        super().__init__()
        self.model, self.with_output = model, with_output
        self.head = torch.nn.Linear(6, 2)

    def forward(self, x, hx=None, lengths=None, reset=None, reset_to=None):
        resets = {"reset": reset, "reset_to": reset_to}
        if not self.with_output:
            last = tensors_in(self.model.last_state(x, hx, lengths, **resets))
            return sum(self.score(state).square().sum() for state in last)
        output, *last = tensors_of(self.model(x, hx, lengths, **resets))
        return output.square().sum() + sum(self.score(state).sum() for state in last)

    def score(self, state):  # h may have fewer features than c
        return state @ self.head.weight[:, : state.shape[-1]].T + self.head.bias


def packed(lengths, in_order=True):
    order = sorted(lengths, reverse=True) if in_order else lengths
    return pack_sequence([torch.randn(n, 4) for n in order], enforce_sorted=in_order)


def initial_states(kind, x):
    batch = x.batch_sizes[0] if isinstance(x, PackedSequence) else x.shape[1]
    return kind.states(torch.randn, 4, batch, 6)


def check(compiled, net, *arguments):
    """Checks that the compiled and the eager network compute the same loss and gradients."""
    inputs = [t for t in tree_leaves(arguments) if torch.is_tensor(t) and t.is_floating_point()]
    wanted = [*(t.requires_grad_() for t in inputs), *net.parameters()]
    results = []
    for run in (net, compiled):
        loss = run(*arguments)
        results.append([loss, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), net(*arguments))


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("name", "layout", "options", "with_output", "with_hx"),
    [
        ("rnn", "dense", {"batch_first": True}, True, False),
        ("rnn", "dense", {"nonlinearity": "relu"}, False, True),
        ("rnn", "packed", {}, True, False),
        ("rnn", "packed", {}, True, True),
        ("rnn", "packed unsorted", {}, True, False),
        ("rnn", "packed unsorted", {}, False, True),
        ("rnn", "ids", {"padding_idx": 3}, True, False),
        ("rnn", "ids", {}, False, True),
        ("gru", "dense", {"bias": False}, True, True),
        ("gru", "packed", {}, True, False),
        ("gru", "packed unsorted", {}, True, False),
        ("gru", "ids", {"padding_idx": 3}, False, False),
        ("lstm", "dense", {"bias": False}, True, True),
        ("lstm", "packed unsorted", {}, True, False),
        ("lstm", "ids", {"padding_idx": 3}, False, False),
        ("projected", "dense", {}, True, True),
        ("projected", "packed unsorted", {"bias": False}, False, False),
    ],
    ids=str,
)
def test_inductor_computes_the_eager_loss_and_gradients(
    name, layout, options, with_output, with_hx
):
    kind, options = VARIANTS[name], STACK | options
    model = kind.tokens(V, 4, 6, **options) if layout in IDS else kind.layer(4, 6, **options)
    net = Net(model, with_output)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in ((5, 3), (9, 4)):
        x = INPUTS[layout](*size)
        check(compiled, net, x, initial_states(kind, x) if with_hx else None)


@pytest.mark.covering(0)
@pytest.mark.parametrize("layout", FEATURES)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("dynamic", [True, None])
def test_one_compiled_graph_works_for_every_shape(kind, layout, with_hx, dynamic):
    """With `dynamic=True` the first graph works for every shape. By default, the second does."""
    net = Net(kind.layer(4, 6, **STACK))
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in SIZES:
        x = INPUTS[layout](*size)
        compiled(x, initial_states(kind, x) if with_hx else None).backward()
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


@pytest.mark.slow
@pytest.mark.covering(0)
@for_variants
@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_states_after_resets_can_be_compiled_and_exported(kind, with_output, ids):
    model = kind.tokens(V, 4, 6, 2) if ids else kind.layer(4, 6, 2)
    net = Net(model, with_output)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    # In the first call, seq_len and batch must differ, or Dynamo would treat them as one size.
    for size in (*SIZES[2:], *SIZES[:2]):
        x = INPUTS["ids" if ids else "dense"](*size)
        after = kind.states(torch.randn, size[0], 2, size[1], 6)
        call = x, None, None, torch.rand(size) < 0.4, after
        check(compiled, net, *call)
    assert counters["stats"]["unique_graphs"] == 2  # with gradients and without
    with torch.no_grad():
        program = torch.export.export(net, call).module()
        assert torch.equal(program(*call), net(*call))


@pytest.mark.covering(0)
@pytest.mark.parametrize("layout", IDS)
@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_one_compiled_graph_works_for_any_number_of_ids(kind, layout, with_output, vocabulary):
    """Choosing between a table and gathered rows does not add a guard on the number of ids."""
    net = Net(kind.tokens(vocabulary, 4, 6), with_output)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        check(compiled, net, INPUTS[layout](*size))
    assert counters["stats"]["unique_graphs"] == 2  # with gradients and without


def our_nodes(graph):
    return [node for node in graph.nodes if str(node.target).startswith("namernn_fast.")]


def exported(module, with_hx):
    """Returns `module` exported at one shape, with dynamic `seq_len` and `batch`."""
    seq_len, batch = Dim("seq_len"), Dim("batch")
    x = {0: batch, 1: seq_len} if module.batch_first else {0: seq_len, 1: batch}
    arguments, dims = (torch.randn(5, 3, 4),), (x,)
    if with_hx:
        kind, sequences = kind_of(module), 5 if module.batch_first else 3
        hx = kind.states(torch.randn, module.num_layers * 2, sequences, 6)
        arguments, dims = (*arguments, hx), (x, kind.states(lambda: {1: batch}))
    return torch.export.export(module, arguments, dynamic_shapes=dims)


@pytest.mark.covering(0)
@for_variants
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_exported_layers_are_bit_identical_to_eager_layers(
    kind, batch_first, with_hx, training, tmp_path
):
    options = {"bias": not batch_first, "batch_first": batch_first}
    module = kind.layer(4, 6, **options, **STACK).train(training)
    program = exported(module, with_hx)
    assert 0 < len(our_nodes(program.graph)) <= 4
    assert len(our_nodes(program.run_decompositions().graph)) == len(our_nodes(program.graph))
    torch.export.save(program, tmp_path / "rnn.pt2")
    loaded = torch.export.load(tmp_path / "rnn.pt2").module()
    for shape in ((2, 9, 4), (50, 2, 4), (3, 70, 4)):
        x = torch.randn(shape)
        batch = shape[0 if module.batch_first else 1]
        arguments = (x, kind.states(torch.randn, 4, batch, 6)) if with_hx else (x,)
        torch.testing.assert_close(loaded(*arguments), module(*arguments), rtol=0, atol=0)


def test_exported_layer_accepts_other_packed_lengths(kind):
    module = OnRows(kind.layer(4, 6, **STACK))
    data, batch_sizes, *_ = packed([5, 3, 2])
    program = torch.export.export(
        module, (data, batch_sizes), dynamic_shapes=({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    )
    assert 0 < len(our_nodes(program.graph)) <= 4
    for lengths in ([7, 6, 3, 2], [9], [4] * 20):
        data, batch_sizes, *_ = packed(lengths)
        torch.testing.assert_close(
            program.module()(data, batch_sizes), module(data, batch_sizes), rtol=0, atol=0
        )


@pytest.mark.parametrize("dynamo_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dynamo_traces_fused_layers_but_rejects_torchs_layers(dynamo_first, run_program, tmp_path):
    """Dynamo may be imported before or after the package.

    The package itself must not import a compiler or an exporter, which would take seconds.
    """
    program = f"""
import sys, torch
{"import torch._dynamo" if dynamo_first else ""}
before = set(sys.modules)
import namernn_fast
slow = {{"torch._dynamo", "onnx", "onnxscript", "torchao"}}
assert not (sys.modules.keys() - before) & slow
x = torch.randn(3, 2, 4)
for name in {[kind.nn_layer.__name__ for kind in DROP_INS.values()]}:
    layer = getattr(namernn_fast, "Fused" + name)(4, 5)
    print(tuple(torch.compile(layer, fullgraph=True, backend="eager")(x)[0].shape))
    try:
        torch.compile(getattr(torch.nn, name)(4, 5), fullgraph=True, backend="eager")(x)
    except torch._dynamo.exc.Unsupported:
        print("rejected as before")
"""
    out = run_program("-c", program, cwd=tmp_path)
    assert out.splitlines() == ["(3, 2, 5)", "rejected as before"] * len(DROP_INS)


@pytest.mark.covering(0)
@pytest.mark.parametrize("forward", [False, True], ids=["eager", "compiled"])
def test_compiled_autograd_computes_the_eager_gradients(kind, forward):
    """Compiled autograd compiles the backward pass after an eager or a compiled forward pass."""
    module, x = kind.layer(3, 4, 2), torch.randn(5, 2, 3)
    wanted = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    run = torch.compile(module, backend="aot_eager") if forward else module
    output, _ = run(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        output.sum().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [*wanted])


@pytest.mark.covering(0)
@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_compiled_token_models_ignore_ids_in_padding(kind, vocabulary):
    """Compiled and eager models agree even if the padding contains ids that are out of range."""
    net = Net(kind.tokens(vocabulary, 4, 6, batch_first=True))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    ids, lengths = torch.randint(V, (4, 7)), torch.tensor([3, 0, 7, 1])
    ids[torch.arange(7) >= lengths[:, None]] = -(2**62)
    check(compiled, net, ids, None, lengths)
    check(compiled, net, ids.clamp(-1).int(), kind.states(torch.randn, 1, 4, 6), lengths)


@pytest.mark.covering(0)
def test_an_embedding_of_dynamic_size_compiles_once(kind):
    """The call gathers rows, because choosing a table would add a guard on the embedding's size."""
    layer = kind.layer(4, 6)

    def run(ids, embedding):
        return layer(ids, embedding=embedding)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for vocabulary in (5, 50, 5000):
        ids, embedding = torch.randint(vocabulary, (7, 3)), torch.randn(vocabulary, 4)
        torch.testing.assert_close(compiled(ids, embedding), layer(F.embedding(ids, embedding))[0])
    assert counters["stats"]["unique_graphs"] == 1


def ids_and_lengths(seq_len, batch):
    ids, lengths = torch.randint(V, (seq_len, batch)), torch.randint(seq_len + 1, (batch,))
    ids[torch.arange(seq_len)[:, None] >= lengths] = -1
    return ids, lengths


def exported_ids(module, **options):
    shapes = ({0: Dim("seq_len"), 1: Dim("batch")}, {0: Dim("batch")})
    return torch.export.export(module, ids_and_lengths(5, 3), dynamic_shapes=shapes, **options)


@pytest.mark.covering(0)
@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_exported_token_models_take_any_number_of_ids(
    kind, with_output, strict, trains, vocabulary, tmp_path
):
    """The exported program matches the model for ids of any shape, and ignores ids in padding."""
    padding_idx = 1 if trains else None
    model = kind.tokens(vocabulary, 4, 6, padding_idx=padding_idx, **STACK)
    module = WithLengths(model, with_output)
    program = exported_ids(module.requires_grad_(trains), strict=strict)
    if not trains:
        assert len(our_nodes(program.graph)) == 1
        rows = [n for n in program.graph.nodes if "aten.embedding" in str(n.target)]
        assert len(rows) == (0 if vocabulary == V else 1)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in ((2, 9), (50, 2), (3, 70)):
        call = ids_and_lengths(*size)
        torch.testing.assert_close(loaded(*call), module(*call))


@pytest.mark.slow
@pytest.mark.parametrize("ids", [False, True])
def test_aot_inductor_package_runs_in_another_process(kind, ids, tmp_path, run_program):
    """A model compiled ahead of time runs in another process that imports `namernn_fast`."""
    model = WithLengths(kind.tokens(V, 4, 6), False) if ids else kind.layer(4, 6, **STACK).eval()
    model.requires_grad_(False)
    program = exported_ids(model) if ids else exported(model, with_hx=False)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    calls = [ids_and_lengths(*size) if ids else (torch.randn(*size, 4),) for size in SIZES[:3]]
    torch.save([(call, model(*call)) for call in calls], tmp_path / "calls.pt")
    program = """
import torch
import namernn_fast
loaded = torch._inductor.aoti_load_package("model.pt2")
for call, wanted in torch.load("calls.pt"):
    got = loaded(*call)
    torch.testing.assert_close(got if torch.is_tensor(wanted) else tuple(got), wanted)
"""
    run_program("-c", program, cwd=tmp_path)
