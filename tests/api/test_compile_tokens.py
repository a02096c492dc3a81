"""`torch.compile` and `torch.export` of token ids: one graph, whatever the number of ids."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from namernn_fast import FusedRNN, TokenRNN
from namernn_fast.tokens import TRACED_VOCABULARY

STACK = {"num_layers": 2, "bidirectional": True}
V = 30  # more than the ids of the first sizes, fewer than those of the last


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


class Net(torch.nn.Module):
    """A model and a linear head on its last states, and on its output if that is wanted."""

    def __init__(self, with_output, vocabulary=V, **options):
        super().__init__()
        self.model = TokenRNN(vocabulary, 4, 6, **options)
        self.head = torch.nn.Linear(6, 2)
        self.with_output = with_output

    def forward(self, ids, hx=None, lengths=None):
        if not self.with_output:
            return self.head(self.model.last_state(ids, hx, lengths)).square().sum()
        output, h_n = self.model(ids, hx, lengths)
        output = output.data if isinstance(output, PackedSequence) else output
        return output.square().sum() + self.head(h_n).sum()


def check(compiled, net, *arguments):
    """Checks that the compiled and the plain network give the same loss and gradients."""
    results = []
    for run in (net, compiled):
        net.zero_grad()
        loss = run(*arguments)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), net(*arguments))


@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize(
    ("vocabulary", "padding_idx"),
    [(V, None), pytest.param(2000, 3, marks=pytest.mark.slow), (V, 3)],
)
def test_inductor(with_output, vocabulary, padding_idx):
    net = Net(with_output, vocabulary, padding_idx=padding_idx, **STACK)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for shape in ((5, 3), (70, 4)):
        check(compiled, net, torch.randint(V, shape))


def packed(seq_len, batch):
    rows = [torch.randint(V, (n,)) for n in (*range(1, seq_len), *[seq_len] * batch)]
    return pack_sequence(rows, enforce_sorted=False)


# Sizes begin at 2, because torch itself compiles anew for a size of 1.
SIZES = [(2 + i, 21 - i) for i in range(20)]
INPUTS = {"padded": lambda seq_len, batch: torch.randint(V, (seq_len, batch)), "packed": packed}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_one_compilation_serves_every_shape(make, with_output, vocabulary):
    """The choice between a table and rows of the embedding makes no guard on the number of ids."""
    net = Net(with_output, vocabulary)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        check(compiled, net, make(*size))
    assert counters["stats"]["unique_graphs"] == 2  # with gradients and without


@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_lengths(vocabulary):
    """Ids in padding may be anything in a compiled model too."""
    net = Net(True, vocabulary, batch_first=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    ids, lengths = torch.randint(V, (4, 7)), torch.tensor([3, 0, 7, 1])
    ids[torch.arange(7) >= lengths[:, None]] = -(2**62)
    check(compiled, net, ids, None, lengths)
    check(compiled, net, ids.clamp(-1).int(), torch.randn(1, 4, 6), lengths)


def test_an_embedding_of_any_size():
    """An embedding whose size is open is no table, as its size would become a guard."""
    layer = FusedRNN(4, 6)

    def run(ids, embedding):
        return layer(ids, embedding=embedding)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for vocabulary in (5, 50, 5000):
        ids, embedding = torch.randint(vocabulary, (7, 3)), torch.randn(vocabulary, 4)
        torch.testing.assert_close(compiled(ids, embedding), layer(F.embedding(ids, embedding))[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_nothing_breaks_the_graph():
    found = torch._dynamo.explain(Net(True, **{"num_layers": 2}))(torch.randint(V, (5, 3)))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def own_nodes(program):
    return [n for n in program.graph.nodes if str(n.target).startswith("namernn_fast.")]


class Method(torch.nn.Module):
    """A model by one of its methods, with lengths."""

    def __init__(self, model, with_output):
        super().__init__()
        self.model, self.with_output = model, with_output

    def forward(self, ids, lengths):
        if self.with_output:
            return self.model(ids, lengths=lengths)
        return self.model.last_state(ids, lengths=lengths)


@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("vocabulary", [V, TRACED_VOCABULARY + 1])
def test_export(with_output, strict, vocabulary, tmp_path):
    """The exported program takes any number of ids, with the bits of the model."""
    module = Method(TokenRNN(vocabulary, 4, 6, **STACK), with_output)
    module.requires_grad_(False)
    seq_len, batch = Dim("seq_len"), Dim("batch")
    shapes = ({0: seq_len, 1: batch}, {0: batch})
    given = torch.randint(V, (5, 3)), torch.tensor([5, 0, 2])
    program = torch.export.export(module, given, dynamic_shapes=shapes, strict=strict)
    assert len(own_nodes(program)) == 1
    rows = [n for n in program.graph.nodes if "aten.embedding" in str(n.target)]
    assert len(rows) == (0 if vocabulary == V else 1)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((2, 9), (50, 2), (3, 70)):
        ids, lengths = torch.randint(V, shape), torch.randint(shape[0] + 1, shape[1:])
        ids[torch.arange(shape[0])[:, None] >= lengths] = -1
        torch.testing.assert_close(loaded(ids, lengths), module(ids, lengths))


def test_export_of_a_program_to_train():
    module = Method(TokenRNN(V, 4, 6, padding_idx=1), True)
    given = torch.randint(V, (5, 3)), torch.tensor([5, 0, 2])
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(module, given, dynamic_shapes=shapes)
    ids, lengths = torch.randint(V, (9, 4)), torch.tensor([9, 1, 0, 3])
    torch.testing.assert_close(program.module()(ids, lengths), module(ids, lengths))


def test_aot_inductor(tmp_path):
    module = Method(TokenRNN(V, 4, 6), False).requires_grad_(False)
    given = torch.randint(V, (5, 3)), torch.tensor([5, 0, 2])
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(module, given, dynamic_shapes=shapes),
        package_path=str(tmp_path / "model.pt2"),
    )
    loaded = torch._inductor.aoti_load_package(package)
    for ids, lengths in (given, (torch.randint(V, (9, 2)), torch.tensor([1, 9]))):
        torch.testing.assert_close(loaded(ids, lengths), module(ids, lengths))
