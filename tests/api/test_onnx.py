"""Tests ONNX export: the nodes of exported graphs, and their results in onnxruntime."""

import copy
import itertools

import oracle
import pytest
import torch
from kinds import KINDS, flat, map_states
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map_only
from wrappers import OnRows, WithLengths

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
    """Returns a function that runs the graph in onnxruntime. It accepts tensors, pairs and None."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        tensors = [x.numpy() for x in tree_leaves(inputs) if x is not None]
        feed = dict(zip(names, tensors, strict=True))
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return run


def as_nn(layer, dtype):
    """Returns torch's own layer or cell with the weights of `layer`, converted to `dtype`."""
    return restore_rnn(copy.deepcopy(layer).to(dtype))


def check_budget(proto, layer, draw, sizes, call=lambda layer, *inputs: layer(*inputs)):
    """Checks the graph's results on inputs that `draw` returns for each of the sizes.

    `call` runs torch's layer on the same inputs.
    """
    run, budget = with_onnxruntime(proto), ErrorBudget(torch.float32)
    for size, _ in itertools.product(sizes, range(4)):
        inputs = draw(*size)
        results = [run(*inputs)]
        with torch.no_grad():
            for dtype in (torch.float32, torch.float64):
                converted = tree_map_only(
                    torch.Tensor,
                    lambda x, to=dtype: x.to(to) if x.is_floating_point() else x,
                    inputs,
                )
                results.append(tree_leaves(call(as_nn(layer, dtype), *converted)))
        for name, (ours, theirs, precise) in enumerate(zip(*results, strict=True)):
            budget.add((*inputs[0].shape, name), ours, theirs, precise.numpy())
    budget.check()


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
    # torch.onnx's optimizer cannot fold Split nodes, and would log a warning about each of them.
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
    check_budget(proto, layer, inputs, UNSEEN)


@pytest.mark.covering(0)
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched_layers_keep_the_error_budget(kind, with_hx):
    layer = kind.layer(D, H, num_layers=2)

    def inputs(seq_len):
        return (torch.randn(seq_len, D), kind.states(torch.ones, 2, H))[: 1 + with_hx]

    shapes = ({0: DYNAMIC}, kind.states(dict))
    proto = export(layer, inputs(5), dynamic_shapes=shapes[: 1 + with_hx])
    check_budget(proto, layer, inputs, [(1,), (9,), (40,)])


@pytest.mark.covering(0)
def test_step_modules_become_one_node_per_operator(kind):
    """A step module is exported like torch's cell, without a node for the whole step."""
    cell = kind.step_module(D, H)

    def inputs(batch):
        return torch.randn(batch, D), kind.states(torch.randn, batch, H)

    shapes = ({0: DYNAMIC}, kind.states(lambda: {0: DYNAMIC}))
    proto = export(cell, inputs(3), dynamic_shapes=shapes)
    assert len(nodes(proto, "Tanh")) == 1 + kind.has_cell_state
    check_budget(proto, cell, inputs, [(1,), (2,), (7,)])


def with_lengths(layer, x, hx, lengths):
    """Runs torch's layer on padded sequences. Empty sequences output zeros and keep hx."""
    is_empty = (lengths == 0)[:, None]
    packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
    output, last = layer(packed, hx)
    output, _ = pad_packed_sequence(output, total_length=len(x))
    initial = map_states(last, torch.zeros_like) if hx is None else hx
    last = map_states(last, lambda new, old: torch.where(is_empty, old, new), initial)
    return output.masked_fill(is_empty, 0), last


LENGTHS = ((9, [4, 0, 9, 1]), (7, [3, 6]), (4, [0, 0, 0]))


@pytest.mark.slow
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
def test_exported_layers_with_lengths_match_torch(name, num_layers, bidirectional, with_hx):
    kind = KINDS[name]
    layer = kind.layer(D, H, num_layers=num_layers, bidirectional=bidirectional)
    states = num_layers * (2 if bidirectional else 1)

    def inputs(seq_len, lengths):
        batch = len(lengths)
        hx = kind.states(torch.randn, states, batch, H) if with_hx else None
        return torch.randn(seq_len, batch, D), hx, torch.tensor(lengths)

    of_hx = kind.states(lambda: {1: DYNAMIC}) if with_hx else None
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, of_hx, {0: DYNAMIC})
    proto = export(layer, inputs(5, [2, 5, 0]), dynamic_shapes=shapes)
    # Only nodes for 8 bits need zeros in the padding of their input.
    of_where = {name for node in nodes(proto, "Where") for name in node.output}
    assert nodes(proto, name.upper())[0].input[0] not in of_where
    check_budget(proto, layer, inputs, LENGTHS, with_lengths)


@pytest.mark.slow
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
    weights = [oracle.precise(weight.detach(), dtype) for weight in layer.parameters()]
    precise = flat(oracle.layer_like(layer, weights)(oracle.precise(x, dtype)))
    precise = map(oracle.numbers_of, precise)
    budget = ErrorBudget(dtype)
    for name, values in enumerate(zip(results, theirs, precise, strict=True)):
        budget.add(name, *values)
    budget.check()


@pytest.mark.covering(0)
def test_a_model_on_another_device_can_be_exported(kind):
    """While torch traces, the operator that becomes the node must return tensors on this device."""
    model = replace_rnn(torch.nn.Sequential(kind.nn_layer(D, H))).append(Head()).to("meta")
    x = torch.randn(5, 3, D, device="meta")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, optimize=False)
    assert [node.op_type for node in program.model.graph].count(kind.name.upper()) == 1


class Head(torch.nn.Linear):
    def __init__(self):
        super().__init__(H, 2)

    def forward(self, results):
        return super().forward(results[0])


@pytest.mark.covering(0)
def test_packed_input_and_resets_are_rejected(kind):
    def rejected(model, arguments, text, **more):
        with pytest.raises(torch.onnx.OnnxExporterError, match=text):
            export(model, arguments, kwargs=more)

    text = "ONNX has no PackedSequence: export a model that takes padded input and lengths="
    rejected(OnRows(kind.layer(D, H)), (torch.randn(6, D), torch.tensor([3, 2, 1])), text)
    x, reset = torch.randn(5, 3, D), torch.ones(5, 3, dtype=torch.bool)
    text = r"ONNX has no reset: .* padded sequences, with lengths="
    rejected(kind.layer(D, H), (x,), text, reset=reset)
    if kind.cell.can_project:
        rejected(kind.layer(D, H, proj_size=1), (x,), "ONNX has no LSTM with projections")


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize(("with_output", "bidirectional"), [(True, True), (False, False)])
def test_token_models_gather_rows_and_become_one_node(kind, with_output, bidirectional):
    """The graph gathers embedding rows instead of making a table, so that the layer is one node."""
    tokens = kind.tokens(9, D, H, bidirectional=bidirectional, padding_idx=2)
    model = WithLengths(tokens, with_output)
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})
    inputs = (torch.zeros(5, 3, dtype=torch.int64), torch.tensor([5, 0, 2]))
    proto = export(model, inputs, dynamic_shapes=shapes)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert len(nodes(proto, kind.name.upper())) == 1
    assert not nodes(proto, "MatMul")
    run = with_onnxruntime(proto)
    for seq_len, lengths in LENGTHS:
        lengths = torch.tensor(lengths)
        ids = torch.randint(9, (seq_len, len(lengths)))
        ids[torch.arange(seq_len)[:, None] >= lengths] = 2**40
        with torch.no_grad():
            wanted = model(ids, lengths)
        torch.testing.assert_close(run(ids, lengths), tree_leaves(wanted))
