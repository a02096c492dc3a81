"""Tests the installed package. Needs no compiler and no other file of this repository.

`make compatibility ONLY=wheel` runs this file in new environments. It needs only torch and pytest.
Tests that need another package are skipped if that package is missing. These tests cover each
feature briefly. The other files in tests/ test the details.
"""

import copy
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import namernn_fast
from namernn_fast import FusedGRU, FusedLSTM, FusedRNN, FusedRNNCell, TokenRNN, explain, replace_rnn
from namernn_fast.machine import availability, torch_private
from namernn_fast.nn.inference import direct
from namernn_fast.testing import ErrorBudget

pytestmark = pytest.mark.slow
T, B, D, H = 12, 7, 16, 37
LENGTHS = [5, 12, 1, 9, 12, 3, 8]
LAYOUTS = ("dense", "packed", "lengths", "jagged")
FUSED = {torch.nn.RNN: FusedRNN, torch.nn.GRU: FusedGRU, torch.nn.LSTM: FusedLSTM}
STACKS = {
    "one layer": (torch.nn.RNN, {}),
    "batch first": (torch.nn.RNN, {"batch_first": True, "bias": False}),
    "two layers, two directions": (torch.nn.RNN, {"num_layers": 2, "bidirectional": True}),
    "GRU": (torch.nn.GRU, {}),
    "LSTM": (torch.nn.LSTM, {}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCHS_LAYERS = {
    "548a86b2ad4138162a5db13bb2a66dc7297595a4fb4b245e057145fcd3f16a35": "2.10",
    "5be3167a71ab06e2690ca16792dfe302be2afd462f24708dc29e09a3eb3b97aa": "2.11",
    "45ba488838119cda365fa304f3638335b584c4c4b6da353a43d4f368da8f0e67": "2.12",
    "902deeba8fd7d3c92b00e3557071b3bb41cf747bd4b2b9d63757d88562688bde": "2.13 and 2.14",
    "f8da80dc0303f9f2af83c613e6eb5f30d9e22b8ceacf151324181d9c71e09e7a": "2.15",
}
"""The SHA-256 of torch.nn.modules.rnn's file in each torch that the layers were compared with, with
the oldest torch first."""


def has(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def pair(dtype=torch.float32, kind=torch.nn.RNN, **options):
    """Returns a fused layer and torch's layer of class `kind`, with equal weights."""
    theirs = kind(D, H, dtype=dtype, **options)
    ours = FUSED[kind](D, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def call(module, x, hx, layout):
    """Runs a layer on x (T, B, D) in a layout. Returns the output (T, B, ...) and last states.

    Torch's layers get a packed sequence instead of lengths or a jagged tensor.
    """
    first = module.batch_first
    padded = x.transpose(0, 1) if first else x
    if layout == "dense":
        output, h_n = module(padded, hx)
    elif layout == "lengths" and type(module) in FUSED.values():
        output, h_n = module(padded, hx, lengths=LENGTHS)
    elif layout == "jagged" and type(module) in FUSED.values():
        rows = [x[:length, b] for b, length in enumerate(LENGTHS)]
        output, h_n = module(torch.nested.as_nested_tensor(rows, layout=torch.jagged), hx)
        return pad_sequence(output.unbind(0)), h_n
    else:
        packed = pack_padded_sequence(padded, LENGTHS, batch_first=first, enforce_sorted=False)
        output, h_n = module(packed, hx)
        return pad_packed_sequence(output)[0], h_n
    return (output.transpose(0, 1) if first else output), h_n


def results(module, layout, seed):
    """Runs a layer on random values. Returns its output, last states and gradients by name."""
    generator = torch.Generator().manual_seed(seed)
    dtype = module.weight_hh_l0.dtype

    def draw(*size):
        # Round to bfloat16, because all dtypes represent bfloat16 numbers of this size exactly.
        return torch.randn(*size, generator=generator).bfloat16().to(dtype)

    states = module.num_layers * (2 if module.bidirectional else 1)
    x = draw(T, B, D).requires_grad_()
    is_lstm = isinstance(module, torch.nn.LSTM)
    first = [draw(states, B, H).requires_grad_() for _ in range(1 + is_lstm)]
    output, last = call(module, x, tuple(first) if is_lstm else first[0], layout)
    last = [*last] if is_lstm else [last]
    module.zero_grad()
    torch.autograd.backward([output, *last], [draw(*value.shape) for value in (output, *last)])
    found = {"output": output, "grad_input": x.grad}
    for name, initial, final in zip("hc", first, last, strict=False):  # only an LSTM has c
        found |= {f"{name}_n": final, f"grad_{name}x": initial.grad}
    found |= {f"grad_{name}": p.grad for name, p in module.named_parameters()}
    return {name: value.detach() for name, value in found.items()}


def test_the_extension_is_installed():
    assert availability.HAS_EXTENSION
    assert "cpu" in str(explain(FusedRNN(D, H), torch.randn(T, B, D)))


def test_python_imports_the_installed_wheel():
    """A checkout on Python's path must not take precedence over the installed wheel."""
    if not (folder := os.environ.get("NAMERNN_FAST_INSTALLED_IN")):
        pytest.skip("no wheel is installed here: `make compatibility ONLY=wheel` installs one")
    assert os.path.commonpath([folder, namernn_fast.__file__]) == folder


def test_torch_has_every_private_name_that_the_package_uses():
    jagged = torch.nested.as_nested_tensor([torch.zeros(2, 3)], layout=torch.jagged)
    objects = {
        "Module": torch.nn.Module(),
        "RNNBase": torch.nn.RNN(D, H),
        "Tensor": torch.zeros(1),
        "NestedTensor": jagged,
        "Function": torch.autograd.Function,
        "Node": torch.autograd.Function._backward_cls,
    }
    absent = [
        f"{name}.{attribute}"
        for name, attributes in torch_private.ATTRIBUTES.items()
        for attribute in attributes
        if not hasattr(objects[name], attribute)
    ]
    assert [*torch_private.absent, *absent] == []
    operator = torch.ops.namernn_fast.forward.default
    assert torch_private.without_python(operator) is not operator


def test_importing_torchs_modules_runs_the_import_hooks():
    """All hooks patch their torch modules without a warning."""
    program = """
import torch, namernn_fast
from namernn_fast import torch_operators
from namernn_fast.integrations import deferred, nn_rnn
from namernn_fast.machine import torch_private
import torch._dynamo.variables.builder as builder
import torch.utils.flop_counter as counter
import torch.nn.utils._expanded_weights.expanded_weights_impl
assert not deferred._waiting
assert builder.VariableBuilder.wrap_module.__wrapped__
assert not builder.config.allow_rnn
assert torch_operators._outside_of_graphs is not torch_operators._OPERATORS
assert torch.ops.namernn_fast.forward in counter.flop_registry
assert nn_rnn._expanded_weights
marked = torch.compiler.assume_constant_result(lambda: None)
assert vars(marked) == vars(torch_private.called_by_dynamo(lambda: None))
"""
    run_python("-W", "error::RuntimeWarning", "-c", program)


def test_the_source_of_torchs_layers_is_known():
    """The fused layers copy checks, errors and attributes of torch's layers, which may change."""
    found = hashlib.sha256(Path(torch.nn.modules.rnn.__file__).read_bytes()).hexdigest()
    assert found in TORCHS_LAYERS, (
        f"torch.nn.modules.rnn of torch {torch.__version__} is unknown. Compare it with the file "
        f"of torch {[*TORCHS_LAYERS.values()][-1]}: arguments and checks of the constructors, "
        "attributes of RNNBase, the checks and messages of forward and of the cells, and what "
        f"TorchScript compiles. Follow what changed, and add {found} to TORCHS_LAYERS"
    )


X = torch.randn(T, B, D)
WRONG_CALLS = {
    "features": (X[..., 1:], None),
    "dimensions": (X[0, 0], None),
    "no steps": (X[:0], None),
    "hx of other layers": (X, torch.zeros(2, B, H)),
    "hx of another batch": (X, torch.zeros(1, B + 1, H)),
    "hx without a batch": (X, torch.zeros(1, H)),
    "dtype": (X.double(), None),
    "device": (X.to("meta"), None),
}


@pytest.mark.parametrize(("input", "hx"), WRONG_CALLS.values(), ids=WRONG_CALLS)
@pytest.mark.parametrize("kind", FUSED)
def test_errors_of_invalid_calls_match_torchs_layer(kind, input, hx):
    errors = []
    for layer in pair(kind=kind):
        states = (hx, hx) if hx is not None and kind is torch.nn.LSTM else hx
        with pytest.raises((RuntimeError, ValueError)) as raised:
            layer(input, states)
        errors.append((raised.type, str(raised.value)))
    if errors[1][1].startswith("input must have the type"):  # up to torch 2.10
        errors = [kind for kind, _ in errors]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("kind", FUSED)
def test_errors_of_invalid_options_match_torchs_layer(kind):
    wrong = {"hidden_size": 0}, {"num_layers": 0}, {"dropout": 2.0}, {"bias": 1}, {"no_option": 1}
    for options in wrong:
        errors = []
        for cls in (FUSED[kind], kind):
            try:
                cls(**{"input_size": D, "hidden_size": H} | options)
                errors.append(None)
            except (TypeError, ValueError) as error:
                errors.append((type(error), str(error).replace("Fused", "")))
        assert errors[0] == errors[1]


def test_steps_bypass_torchs_dispatcher(monkeypatch):
    """Streams and step modules access tensors through DLPack's C functions, which is faster."""
    taken = []
    run = direct.step_directly
    monkeypatch.setattr(
        direct, "step_directly", lambda *each: taken.append(run(*each)) or taken[-1]
    )
    monkeypatch.setattr(direct, "KERNEL", "avx2")
    FusedRNN(D, H).prepare().stream(B)(X[0])
    for cell in (FusedRNNCell(D, H), FusedRNNCell(D, H).prepare()):
        with torch.no_grad():
            cell(X[0])
    assert taken == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), STACKS.values(), ids=STACKS)
def test_results_and_gradients_meet_the_error_budget(kind, options, dtype):
    """Pools all layouts and draws in one budget, since small results may be exact by chance."""
    torch.manual_seed(0)
    ours, theirs = pair(dtype, kind, **options)
    precise = copy.deepcopy(theirs).double()
    budget = ErrorBudget(dtype)
    for layout in LAYOUTS:
        for seed in range(4):
            reference = results(precise, layout, seed)
            mine, torchs = results(ours, layout, seed), results(theirs, layout, seed)
            for name, value in reference.items():
                budget.add(name, mine[name], torchs[name], value)
    budget.check()


def test_a_reset_matches_two_separate_calls():
    ours, theirs = pair(torch.float64, nonlinearity="relu")
    x, reset = torch.randn(T, 1, D, dtype=torch.float64), torch.zeros(T, 1, dtype=torch.bool)
    reset[5] = True
    parts = [theirs(part)[0] for part in (x[:5], x[5:])]
    torch.testing.assert_close(ours(x, reset=reset)[0], torch.cat(parts))


def test_a_token_layer_matches_torch():
    reader = TokenRNN(31, D, H, dtype=torch.float64)
    ids = torch.randint(31, (T, B))
    theirs = torch.nn.RNN(D, H, dtype=torch.float64)
    theirs.load_state_dict(reader.rnn.state_dict())
    output, h_n = theirs(reader.embedding(ids))
    torch.testing.assert_close(reader(ids), (output, h_n))
    torch.testing.assert_close(reader.last_state(ids), h_n)


def test_a_step_module_matches_torch():
    theirs = torch.nn.RNNCell(D, H, dtype=torch.float64)
    ours = FusedRNNCell(D, H, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, h = (torch.randn(B, size, dtype=torch.float64) for size in (D, H))
    torch.testing.assert_close(ours(x, h), theirs(x, h))


class Net(torch.nn.Module):
    """A layer between two torch operators, to test that tracers capture all three in one graph."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = FusedRNN(D, H, **options)

    def forward(self, x, lengths=None):
        output, h_n = self.rnn(torch.sin(x), lengths=lengths)
        return output.square().sum() + h_n.sum()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "lengths"])
def test_a_compiled_module_matches_the_eager_module(lengths):
    torch._dynamo.reset()
    net, x = Net(num_layers=2, bidirectional=True), torch.randn(T, B, D)
    lengths = None if lengths is None else torch.tensor(lengths)
    seen = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        loss = run(x, lengths)
        loss.backward()
        seen.append([loss, *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(*seen)


def test_changing_the_precision_setting_recompiles_the_module():
    torch._dynamo.reset()
    graphs = []
    layer, x = FusedRNN(D, H).requires_grad_(False), torch.randn(T, B, D)
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph)
    operator = getattr(torch.backends.mkldnn, layer._cell.fp32_precision)
    counts, previous = [], operator.fp32_precision
    try:
        for precision in ("ieee", "ieee", "bf16"):
            operator.fp32_precision = precision
            compiled(x)
            counts.append(len(graphs))
    finally:
        operator.fp32_precision = previous
    assert counts == [1, 1, 2]


def test_an_exported_program_accepts_other_sequence_lengths_and_batches():
    net, x = Net().eval(), torch.randn(T, B, D)
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("B", min=2)}
    program = torch.export.export(net, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(T + 3, B + 2, D)
    torch.testing.assert_close(program.module()(other), net(other))


def test_vmap_and_per_sample_gradients_match_single_calls():
    layer, x = FusedRNN(D, H, dtype=torch.float64), torch.randn(3, T, B, D, dtype=torch.float64)
    expected = torch.stack([layer(sample)[0] for sample in x])
    torch.testing.assert_close(torch.func.vmap(lambda sample: layer(sample)[0])(x), expected)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    layer(x[0])[0].square().sum().backward()
    torch.testing.assert_close(each["weight_hh_l0"][0], layer.weight_hh_l0.grad)


@pytest.mark.skipif(not has("onnx", "onnxscript", "onnxruntime"), reason="needs ONNX")
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_model_matches_the_layer():
    import onnxruntime

    layer, x = FusedRNN(D, H, num_layers=2, bidirectional=True).eval(), torch.randn(T, B, D)
    exported = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert (
        sum(node.op_type == "RNN" for node in exported.model_proto.graph.node) == layer.num_layers
    )
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = [value.numpy() for value in layer(x)]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(wanted))


def test_a_model_with_a_replaced_layer_can_be_saved_and_loaded():
    model = torch.nn.ModuleDict({"rnn": torch.nn.RNN(D, H), "head": torch.nn.Linear(H, 2)})
    x = torch.randn(T, B, D)
    expected = model["rnn"](x)
    swapped = replace_rnn(copy.deepcopy(model))
    assert isinstance(swapped["rnn"], FusedRNN)
    file = io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded["rnn"](x), expected)
    model.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_the_kernel_of_every_instruction_set_matches_torch(level):
    """The variable ATEN_CPU_CAPABILITY selects the instruction set."""
    levels = ("DEFAULT", "AVX2", "AVX512")
    if not availability.HAS_EXTENSION or torch.backends.cpu.get_cpu_capability() not in levels:
        pytest.skip("ATen has these levels only on x86-64")
    program = """
import torch, namernn_fast
x = torch.randn(9, 5, 16, dtype=torch.float64)
for kind in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM):
    theirs = kind(16, 48, num_layers=2, dtype=torch.float64)
    ours = namernn_fast.replace_rnn(torch.nn.ModuleList([theirs]))[0]
    assert type(ours) is not kind
    torch.testing.assert_close(ours(x), theirs(x))
print(namernn_fast.ops.cpu_kernel(), torch.backends.cpu.get_cpu_capability())
"""
    kernel, capability = run_python("-c", program, ATEN_CPU_CAPABILITY=level).split()
    if capability.lower() != level:
        pytest.skip(f"this processor does not support {level}")
    assert kernel == {"default": "baseline"}.get(level, level)


def test_python_m_namernn_fast_prints_the_installed_versions():
    printed = run_python("-m", "namernn_fast")
    assert namernn_fast.__version__ in printed
    assert torch.__version__ in printed


@pytest.mark.skipif(not has("safetensors", "requests", "tqdm"), reason="needs the names extra")
def test_the_wheel_includes_the_trained_network_of_the_names_application():
    printed = run_python("-m", "namernn_fast.names", "predict", "Yamamoto", "--top", "1")
    assert "Japanese" in printed
