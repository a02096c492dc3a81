"""Tests results, saving, export and errors of prepared modules with 8-bit weights.

test_prepared_modules.py covers copying, refreshing and compiling, and test_streams.py streams.
"""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from kinds import KINDS, flat, map_states, needs_extension
from torch.utils._pytree import tree_leaves

from namernn_fast import PreparedCell, PreparedLayer, explain, ops, prepare_rnn, restore_rnn
from namernn_fast.call import int8
from namernn_fast.machine import availability

pytestmark = [needs_extension, pytest.mark.covering(1)]

OPTIONS = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.fixture(params=["layer", "tokens", "step module"])
def form(request):
    return request.param


def make(kind, form):
    """Returns a module, its prepared version with 8-bit weights, and an input."""
    if form == "layer":
        module, x = kind.layer(6, 20, **OPTIONS), torch.randn(8, 5, 6)
    elif form == "tokens":
        module, x = kind.tokens(9, 6, 20, **OPTIONS), torch.randint(9, (8, 5))
    else:
        module, x = kind.step_module(6, 20), torch.randn(8, 6)
    module.requires_grad_(False)
    return module, module.prepare(torch.int8), x


def equal(first, second):
    return all(map(torch.equal, tree_leaves(first), tree_leaves(second)))


def test_8_bit_results_are_close_to_the_layer(kind, form):
    module, prepared, x = make(kind, form)
    assert prepared.dtype == torch.int8
    assert type(prepared) is (PreparedCell if form == "step module" else PreparedLayer)
    assert "dtype=torch.int8" in repr(prepared)
    torch.testing.assert_close(prepared(x), module(x), atol=0.02, rtol=0)
    assert not equal(prepared(x), module(x))


def test_saving_and_loading_keeps_the_8_bit_weights(kind, form, tmp_path):
    _, prepared, x = make(kind, form)
    wanted, state = prepared(x), prepared.state_dict()
    assert {w.dtype for name, w in state.items() if name.endswith("_int8")} == {torch.int8}
    assert not [name for name in state if name.endswith("weight_hh_l0")]
    torch.save(state, tmp_path / "state")
    other = make(kind, form)[1]
    assert not equal(other(x), wanted)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert equal(other(x), wanted)


def test_loading_invalid_8_bit_weights_raises_an_error(kind, form):
    _, prepared, x = make(kind, form)
    wanted, state = prepared(x), prepared.state_dict()
    name = next(name for name in state if name.endswith("_int8"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepared.load_state_dict({**state, name: state[name][:, :-1]})
    with pytest.raises(RuntimeError, match=f"{name} is missing, but"):
        prepared.load_state_dict({key: w for key, w in state.items() if key != name})
    scale = name.replace("_int8", "_scale")
    for key, wrong in (
        (name, state[name].float()),
        (scale, state[scale][:1]),
        (scale, torch.ones(())),
    ):
        with pytest.raises(RuntimeError, match=rf"must be int8 with a {scale} for each row, got"):
            prepared.load_state_dict({**state, key: wrong})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        prepared.load_state_dict({**state, "x_int8": torch.ones(1), "x_scale": torch.ones(())})
    assert equal(prepared(x), wanted)
    prepared.load_state_dict({**state, scale: state[scale].double()}, assign=True)
    assert equal(prepared(x), wanted)


def test_unsupported_uses_of_8_bit_weights_raise_errors(kind, form):
    module, prepared, x = make(kind, form)
    wanted = prepared(x)
    model = torch.nn.ModuleList([copy.deepcopy(module), prepared])
    with pytest.raises(RuntimeError, match="8-bit weights cannot be restored"):
        restore_rnn(model)
    assert type(model[0]) is type(module)
    with pytest.raises(RuntimeError, match="TorchScript has no 8-bit weights"):
        torch.jit.script(prepared)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=r"8-bit weights need a layer in float32, got torch"):
            prepared.to(dtype)
        with pytest.raises(ValueError, match=r"8-bit weights need a layer in float32"):
            copy.deepcopy(module).to(dtype).prepare(torch.int8)
    assert equal(prepared(x), wanted)
    assert equal(prepared.to("cpu")(x), wanted)
    message = r"dtype must be None or torch.int8, got torch.float16: use layer.to"
    with pytest.raises(ValueError, match=message):
        module.prepare(torch.float16)


def test_without_a_kernel_the_layer_runs_with_rounded_weights(kind, form, monkeypatch):
    _, prepared, x = make(kind, form)
    state = prepared.state_dict()
    monkeypatch.setattr(availability, "why_not_cpu_kernel", lambda input: "a test")
    module, other, _ = make(kind, form)
    other.load_state_dict(state)
    assert other._panels is None
    for name, weight in prepared.state_dict().items():
        if form != "tokens":  # a table is not rounded
            assert torch.equal(weight, other.state_dict()[name])
    module.load_state_dict(other._layer.state_dict())
    assert equal(other(x), module(x))


def test_projections_compute_with_rounded_weights_in_float32():
    layer, x = KINDS["lstm"].layer(4, 16, proj_size=5), torch.randn(6, 3, 4)
    prepared = layer.prepare(torch.int8)
    rounded = copy.deepcopy(layer)
    for weight in rounded.parameters():
        if weight.dim() == 2:
            weight.data = int8.dequantize(*int8.quantize(weight.detach()))
    loaded, stream = pickle.loads(pickle.dumps(prepared)), prepared.stream(3)
    with torch.no_grad():
        for module in (prepared, loaded):
            torch.testing.assert_close(module(x), rounded(x))
        torch.testing.assert_close(torch.stack([stream(frame) for frame in x]), rounded(x)[0])
    why_not = "no kernel takes them, so the layer computes with the rounded weights in float32"
    assert explain(prepared, x).why_no_shortcut["8-bit weights"] == why_not


@pytest.mark.drop_in
def test_prepare_rnn_keeps_small_layers_in_floating_point(kind, monkeypatch):
    model = torch.nn.ModuleDict(
        {
            "small": kind.nn_layer(4, 16),
            "large": kind.layer(4, 300),
            "tokens": kind.tokens(9, 4, 300),
            "step": kind.nn_step_module(4, 300),
            "wide": kind.layer(4, 300, dtype=torch.float64),
            "many": kind.layer(int8.MOST_INPUTS + 1, 1),
            "elsewhere": kind.layer(4, 300, device="meta"),
        }
    )
    if kind.cell.can_project:
        model["projected"] = kind.layer(4, 300, proj_size=5)
    dtypes = {}
    for min_hidden in (None, 0, 17):
        prepared = prepare_rnn(copy.deepcopy(model), torch.int8, min_hidden)
        dtypes[min_hidden] = [name for name, m in prepared.items() if m.dtype == torch.int8]
    assert dtypes[0] == ["small", "large", "tokens", "step"]
    assert dtypes[17] == ["large", "tokens", "step"]
    # Unidirectional token layers stay in float32: with 8-bit weights they could not share prefixes.
    for of_floats, of_int8, wanted in (
        ("avx512", "amx_int8", ["large", "step"]),
        ("avx2", "avx2", ["large", "step"]),
        ("avx512", "avx2", []),
        ("baseline", "baseline", []),
    ):
        kernels = {torch.float32: of_floats, torch.int8: of_int8}
        monkeypatch.setattr(ops, "cpu_kernel", kernels.get)
        message = r"no layer 8-bit weights: this processor has no .*\(min_hidden=0 asks for them"
        warns = contextlib.nullcontext() if wanted else pytest.warns(UserWarning, match=message)
        with warns:
            prepared = prepare_rnn(copy.deepcopy(model), torch.int8)
        assert [name for name, m in prepared.items() if m.dtype == torch.int8] == wanted
    with pytest.raises(ValueError, match=r"dtype must be None or torch.int8, got torch.uint8"):
        prepare_rnn(model, torch.uint8)
    for dtype, wrong in (None, 128), (torch.int8, -1), (torch.int8, 2.5), (torch.int8, True):
        with pytest.raises(ValueError, match=r"min_hidden needs dtype=.* an integer of at least 0"):
            prepare_rnn(model, dtype, wrong)
    assert type(model["large"]) is kind.layer


def test_explain_says_whether_8_bit_weights_are_faster(kind, monkeypatch):
    x = torch.randn(5, 3, 8)
    monkeypatch.setattr(int8, "default_min_hidden", lambda: 32)
    small, large = kind.layer(8, 31), kind.layer(8, 32)
    for layer in (small, large):
        explained = explain(layer.prepare(torch.int8), x)
        assert explained.path == f"cpu {ops.cpu_kernel(torch.int8)}"
        assert explained.shortcuts == ("prepared weights", "8-bit weights")
        reason = explained.why_not.get("float32 weights")
        assert (reason is None) == (layer is large)
    assert reason is None or "pay off if hidden_size is at least 32, not 31" in reason
    for layer, why in (small, "pay off if"), (large, "prepared with its own dtype"):
        assert why in explain(layer.prepare(), x).why_no_shortcut["8-bit weights"]
    monkeypatch.setattr(int8, "default_min_hidden", lambda: None)
    why_not = explain(large.prepare(), x).why_no_shortcut["8-bit weights"]
    assert why_not == "this processor has no instructions that would make them faster"
    double, y = kind.layer(8, 32, dtype=torch.float64), x.double()
    assert "not in float32" in explain(double.prepare(), y).why_no_shortcut["8-bit weights"]


@pytest.mark.drop_in
def test_torchao_prepares_recurrent_layers(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        from namernn_fast.torchao import RecurrentConfig, is_recurrent
    model = torch.nn.Sequential(kind.nn_layer(6, 300), torch.nn.Linear(300, 2))
    model.same, x = model[0], torch.randn(5, 3, 6)
    wanted = model[0](x)[0]
    torchao.quantize_(model, RecurrentConfig(min_hidden=0), is_recurrent)
    assert model.same is model[0]
    assert (type(model[0]), model[0].dtype) == (PreparedLayer, torch.int8)
    assert type(model[1]) is torch.nn.Linear
    torch.testing.assert_close(model[0](x)[0], wanted, atol=0.02, rtol=0)
    layer = kind.step_module(6, 20)
    torchao.quantize_(layer, RecurrentConfig(dtype=None), is_recurrent)
    assert (type(layer), layer.dtype) == (PreparedCell, None)


STACK = {"num_layers": 2, "bidirectional": True, "bias": False}


@pytest.mark.slow
@pytest.mark.covering(0)
@pytest.mark.parametrize("options", [{}, STACK, {"num_layers": 2, "batch_first": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_onnx_runtime_matches_an_lstm_with_8_bit_weights(options, batch, with_lengths):
    """The tolerance is 0.04, because ONNX Runtime uses one scale for inputs and states.

    The session option makes matrix products exact on processors without VNNI. It requires a
    separate constant for each zero point, so the optimizer, which merges constants, is off.
    """
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    prepared = KINDS["lstm"].layer(20, 32, **options).prepare(torch.int8)
    x = torch.randn(batch, 11, 20) if prepared.batch_first else torch.randn(11, batch, 20)
    states = prepared.num_layers * (2 if prepared.bidirectional else 1)
    hx = map_states(KINDS["lstm"].states(torch.rand, states, batch, 32), lambda state: state - 0.5)
    lengths = torch.tensor([11, 0, 5])[:batch] if with_lengths else None
    program = torch.onnx.export(
        prepared, (x, hx, lengths), dynamo=True, verbose=False, optimize=False
    ).model_proto
    quantized = [n for n in program.graph.node if n.op_type == "DynamicQuantizeLSTM"]
    assert len(quantized) == prepared.num_layers
    session_options = onnxruntime.SessionOptions()
    session_options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(program.SerializeToString(), session_options)
    given = [tensor for tensor in (x, *hx, lengths) if tensor is not None]
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
    wanted = flat(prepared(x, hx, lengths))
    for got, want in zip(session.run(None, feed), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, atol=0.04, rtol=0)


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_onnx_export_rejects_other_cells_with_8_bit_weights(cell):
    pytest.importorskip("onnxscript")
    prepared = KINDS[cell].layer(4, 5).prepare(torch.int8)
    node = prepared._layer._cell.torch.onnx.operator
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        torch.onnx.export(prepared, (torch.randn(3, 2, 4),), dynamo=True, verbose=False)
    assert f"ONNX Runtime has no {node} with 8-bit weights" in str(raised.value.__cause__)
