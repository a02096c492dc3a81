"""Tests ONNX export: checks the graphs of layers, and compares their results in onnxruntime."""

import copy
import itertools

import oracle
import pytest
import torch
from cases import exact
from kinds import KINDS, flat, map_states, tensors_in
from torch.utils._pytree import tree_leaves, tree_map

from namernn_fast import replace_rnn, restore_rnn
from namernn_fast.testing import ErrorBudget

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
reference = pytest.importorskip("onnx.reference")

pytestmark = [
    pytest.mark.drop_in,
    pytest.mark.covering(1),
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode"),
]

DYNAMIC = torch.export.Dim.DYNAMIC
UNSEEN = ((1, 1), (9, 2), (40, 7))
D, H = 5, 37


def export(model, arguments=(), **options):
    return torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options).model_proto


def nodes(proto, op_type):
    return [node for node in proto.graph.node if node.op_type == op_type]


def attributes_of(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def with_onnxruntime(proto):
    """Returns a function that runs the graph in onnxruntime on tensors or pairs of tensors."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        feed = {name: x.numpy() for name, x in zip(names, tree_leaves(inputs), strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return run


def as_nn(layer, dtype):
    """Returns torch's own layer or cell with the weights of `layer`, converted to `dtype`."""
    twin = copy.deepcopy(layer).to(dtype)
    return restore_rnn(twin)


def compare(budget, run, layer, *inputs):
    results = [run(*inputs)]
    with torch.no_grad():
        for dtype in (inputs[0].dtype, torch.float64):
            result = as_nn(layer, dtype)(*tree_map(lambda x, dtype=dtype: x.to(dtype), inputs))
            results.append(tree_leaves(result))
    for name, (ours, theirs, precise) in enumerate(zip(*results, strict=True)):
        budget.add((*inputs[0].shape, name), ours, theirs, precise.numpy())


@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("options", "with_hx"),
    [
        ({}, False),
        ({"nonlinearity": "relu", "bias": False, "batch_first": True}, True),
        ({"num_layers": 2, "bidirectional": True}, False),
        ({"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}, True),
    ],
)
def test_each_layer_becomes_one_node_for_any_length_and_batch(kind, options, with_hx, caplog):
    layer = kind.layer(D, H, **kind.known(options))
    directions = 2 if layer.bidirectional else 1

    def inputs(seq_len, batch):
        shape = (batch, seq_len, D) if layer.batch_first else (seq_len, batch, D)
        x = torch.randn(shape)
        hx = kind.states(torch.randn, layer.num_layers * directions, batch, H)
        return (x, hx) if with_hx else (x,)

    shapes = ({0: DYNAMIC, 1: DYNAMIC}, kind.states(lambda: {1: DYNAMIC}))
    proto = export(layer, inputs(5, 3), dynamic_shapes=shapes[: 1 + with_hx])
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    found = nodes(proto, kind.name.upper())
    assert len(found) == layer.num_layers
    attributes = {"linear_before_reset": 1} if kind.name == "gru" else {}
    if kind.has_nonlinearity:
        attributes = {"activations": [layer.nonlinearity.capitalize().encode()] * directions}
    # torch.onnx's optimizer cannot fold Split nodes, and would warn about each Split.
    assert "Skipping constant folding for op Split" not in caplog.text
    for node in found:
        assert attributes_of(node) == attributes | {
            "direction": b"bidirectional" if layer.bidirectional else b"forward",
            "hidden_size": H,
        }
        biases, sequence_lens, initial_h, initial_c = [*node.input, "", "", "", ""][3:7]
        assert bool(biases) == layer.bias
        assert bool(initial_h) == with_hx
        assert bool(initial_c) == (with_hx and kind.has_cell_state)
        assert not sequence_lens
    run = with_onnxruntime(proto)
    budget = ErrorBudget(torch.float32)
    for seq_len, batch in UNSEEN:
        for _ in range(4):
            compare(budget, run, layer, *inputs(seq_len, batch))
    budget.check()


@pytest.mark.covering(0)
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched_layers_keep_the_error_budget(kind, with_hx):
    layer = kind.layer(D, H, num_layers=2)
    inputs = (torch.randn(5, D), kind.states(torch.ones, 2, H))[: 1 + with_hx]
    shapes = ({0: DYNAMIC}, kind.states(dict))
    run = with_onnxruntime(export(layer, inputs, dynamic_shapes=shapes[: len(inputs)]))
    budget = ErrorBudget(torch.float32)
    for seq_len, _ in UNSEEN:
        for _ in range(4):
            compare(budget, run, layer, torch.randn(seq_len, D), *inputs[1:])
    budget.check()


@pytest.mark.covering(0)
def test_step_modules_become_one_node_per_operator(kind):
    """A step module is exported like torch's cell, without a node for the whole step."""
    cell = kind.step_module(D, H)
    shapes = ({0: DYNAMIC}, kind.states(lambda: {0: DYNAMIC}))
    example = torch.randn(3, D), kind.states(torch.randn, 3, H)
    proto = export(cell, example, dynamic_shapes=shapes)
    assert len(nodes(proto, "Tanh")) == 1 + kind.has_cell_state
    run = with_onnxruntime(proto)
    budget = ErrorBudget(torch.float32)
    for _, batch in UNSEEN:
        for _ in range(4):
            states = kind.states(torch.randn, batch, H)
            compare(budget, run, cell, torch.randn(batch, D), states)
    budget.check()


class Padded(torch.nn.Module):
    """A layer that takes padded input and lengths."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind.layer(D, H, **options)

    def forward(self, x, lengths, hx=None):
        return self.rnn(x, hx, lengths=lengths)


def one_by_one(layer, x, lengths, hx):
    """Runs each sequence separately; an empty sequence outputs zeros and keeps its states."""
    last = map_states(hx, torch.clone)
    output = x.new_zeros(*x.shape[:2], len(tensors_in(hx)[0]) * H)
    for b, n in enumerate(lengths):
        views = map_states(last, lambda state, b=b: state[:, b : b + 1])
        if n:
            output[:n, b : b + 1], results = layer(x[:n, b : b + 1], map_states(views, torch.clone))
            tree_map(torch.Tensor.copy_, views, results)
    return output, last


def layers_one_by_one(layer, x, lengths, hx):
    """Runs each layer of a stack with `one_by_one`."""
    directions = 2 if layer.bidirectional else 1
    states = []
    for k in range(layer.num_layers):
        layer_hx = map_states(hx, lambda state, k=k: state[k * directions : (k + 1) * directions])
        twin = type(layer)(x.shape[-1], H, bidirectional=layer.bidirectional, dtype=x.dtype)
        with torch.no_grad():
            weights = layer.all_weights[k * directions : (k + 1) * directions]
            for p, value in zip(twin.parameters(), itertools.chain(*weights), strict=True):
                p.copy_(value)
        x, last = one_by_one(twin, x, lengths, layer_hx)
        states.append(last)
    return x, tree_map(lambda *each: torch.cat(each), *states)


@pytest.mark.covering(0)
@pytest.mark.parametrize(
    ("name", "num_layers", "bidirectional", "with_hx"),
    [
        ("rnn", 1, False, True),
        ("rnn", 1, True, False),
        ("gru", 1, False, True),
        ("gru", 2, True, False),
        ("gru", 2, True, True),
        ("lstm", 2, True, False),
        ("lstm", 2, True, True),
    ],
)
def test_lengths_match_separate_sequences(name, num_layers, bidirectional, with_hx):
    kind = KINDS[name]
    model = Padded(kind, num_layers=num_layers, bidirectional=bidirectional)
    states = num_layers * (2 if bidirectional else 1)

    def inputs(seq_len, lengths):
        x = torch.randn(seq_len, len(lengths), D)
        hx = kind.states(torch.randn, states, len(lengths), H)
        return (x, torch.tensor(lengths), hx) if with_hx else (x, torch.tensor(lengths))

    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC}, kind.states(lambda: {1: DYNAMIC}))
    run = with_onnxruntime(
        export(model, inputs(5, [2, 5, 0]), dynamic_shapes=shapes[: 2 + with_hx])
    )
    budget = ErrorBudget(torch.float32)
    for seq_len, lengths in ((9, [4, 0, 9, 1]), (7, [3, 6]), (4, [0, 0, 0])):
        for _ in range(4):
            x, _, *hx = arguments = inputs(seq_len, lengths)
            state = hx[0] if hx else kind.states(torch.zeros, states, len(lengths), H)
            results = [run(*arguments)]
            with torch.no_grad():
                for dtype in (torch.float32, torch.float64):
                    twin = as_nn(model.rnn, dtype)
                    converted = map_states(state, lambda state, dtype=dtype: state.to(dtype))
                    results.append(flat(layers_one_by_one(twin, x.to(dtype), lengths, converted)))
            for name, (ours, theirs, precise) in enumerate(zip(*results, strict=True)):
                budget.add((seq_len, name), ours, theirs, precise.numpy())
    budget.check()


@pytest.mark.covering(0)
def test_dropout_is_exported_only_in_training(kind):
    layer = kind.layer(D, H, num_layers=3, dropout=0.5)
    for training, count in ((True, 2), (False, 0)):
        proto = export(layer.train(training), (torch.randn(5, 3, D),))
        assert len(nodes(proto, "Dropout")) == count


@pytest.mark.covering(0)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_graphs_are_valid_in_other_dtypes(kind, dtype):
    """The graph is valid ONNX in every dtype, and its results are correct in float16 and float64.

    onnxruntime runs the float16 graph, and onnx's reference evaluator runs the float64 graph.
    """
    layer = kind.layer(D, H, dtype=dtype)
    x = torch.randn(9, 4, D, dtype=dtype)
    proto = export(layer, (x,), opset_version=22 if dtype == torch.bfloat16 else None)
    onnx.checker.check_model(proto, full_check=True)
    assert len(nodes(proto, kind.name.upper())) == 1
    if dtype == torch.bfloat16:
        return
    if dtype == torch.float64:
        results = reference.ReferenceEvaluator(proto).run(None, {"input": x.numpy()})
        results = [torch.from_numpy(result) for result in results]
    else:
        results = with_onnxruntime(proto)(x)
    with torch.no_grad():
        theirs = flat(as_nn(layer, dtype)(x))
    if kind.gates > 1:
        with torch.no_grad():
            precise = flat(as_nn(layer, torch.float64)(x.double()))
        if dtype == torch.float64:  # a budget needs a reference more precise than float64
            torch.testing.assert_close(tuple(results), precise, rtol=1e-12, atol=1e-12)
            return
        budget = ErrorBudget(dtype)
        for name, values in enumerate(zip(results, theirs, precise, strict=True)):
            budget.add(name, *values)
        budget.check()
        return
    weights = [exact(w.detach(), dtype) for w in layer.parameters()]
    hx = exact(torch.zeros(1, 4, H), dtype)
    outputs, h_n, _ = oracle.rnn(list(exact(x, dtype).swapaxes(0, 1)), hx, weights, "tanh", False)
    budget = ErrorBudget(dtype)
    budget.add("h_n", results[1], theirs[1], h_n)
    for b, output in enumerate(outputs):
        budget.add("output", results[0][:, b], theirs[0][:, b], output)
    budget.check()


@pytest.mark.covering(0)
def test_a_model_on_another_device_can_be_exported(kind):
    """The node's placeholder in torch's graph must be on the device of the model's input."""
    model = replace_rnn(torch.nn.Sequential(kind.nn_layer(D, H))).append(Head()).to("meta")
    x = torch.randn(5, 3, D, device="meta")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False)
    assert [node.op_type for node in program.model.graph].count(kind.name.upper()) == 1


class Head(torch.nn.Linear):
    def __init__(self):
        super().__init__(H, 2)

    def forward(self, results):
        return super().forward(results[0])


class OnPackedData(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind.layer(D, H)

    def forward(self, data, batch_sizes):
        return self.rnn(torch.nn.utils.rnn.PackedSequence(data, batch_sizes))[1]


class WithReset(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind.layer(D, H)

    def forward(self, x, reset):
        return self.rnn(x, reset=reset)[1]


@pytest.mark.covering(0)
def test_packed_input_and_resets_are_rejected(kind):
    packed = (torch.randn(6, D), torch.tensor([3, 2, 1]))
    text = "ONNX has no PackedSequence: export a model that takes padded input and lengths="
    with pytest.raises(torch.onnx.OnnxExporterError, match=text):
        export(OnPackedData(kind), packed)
    resetting = WithReset(kind)
    text = r"ONNX has no reset: .* padded sequences, with lengths="
    with pytest.raises(torch.onnx.OnnxExporterError, match=text):
        export(resetting, (torch.randn(5, 3, D), torch.ones(5, 3, dtype=torch.bool)))
    if kind.cell.can_project:
        with pytest.raises(torch.onnx.OnnxExporterError, match="ONNX has no LSTM with projections"):
            export(kind.layer(D, H, proj_size=1), (torch.randn(5, 3, D),))


VOCABULARY = 9


class OnTokens(torch.nn.Module):
    """Calls `forward` or `last_state` of a model on token ids, with lengths."""

    def __init__(self, kind, with_output, **options):
        super().__init__()
        self.model, self.with_output = kind.tokens(VOCABULARY, D, H, **options), with_output

    def forward(self, ids, lengths):
        if self.with_output:
            return self.model(ids, lengths=lengths)
        return self.model.last_state(ids, lengths=lengths)


@pytest.mark.covering(0)
@pytest.mark.parametrize(("with_output", "bidirectional"), [(True, True), (False, False)])
def test_token_models_gather_rows_and_become_one_node(kind, with_output, bidirectional):
    """The graph gathers embedding rows instead of making a table, so that the layer is one node."""
    model = OnTokens(kind, with_output, bidirectional=bidirectional, padding_idx=2)
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})
    inputs = (torch.zeros(5, 3, dtype=torch.int64), torch.tensor([5, 0, 2]))
    proto = export(model, inputs, dynamic_shapes=shapes)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert len(nodes(proto, kind.name.upper())) == 1
    assert not nodes(proto, "MatMul")
    run = with_onnxruntime(proto)
    for seq_len, lengths in ((9, [4, 0, 9, 1]), (7, [3, 6]), (4, [0, 0, 0])):
        lengths = torch.tensor(lengths)
        ids = torch.randint(VOCABULARY, (seq_len, len(lengths)))
        ids[torch.arange(seq_len)[:, None] >= lengths] = 2**40
        with torch.no_grad():
            wanted = model(ids, lengths)
        torch.testing.assert_close(run(ids, lengths), tree_leaves(wanted))
