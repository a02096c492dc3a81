"""Tests TorchScript, `torch.fx` and quantization on models that contain a layer or a cell."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves
from wrappers import OnRows, WithLengths

from namernn_fast import batch_invariant, replace_rnn, restore_rnn

XS = torch.randn(2, 6, 3), torch.randn(5, 9, 3)
IDS = torch.randint(7, (6, 2)), torch.randint(7, (9, 5))


class Model(nn.Module):
    """A model with a layer and a cell."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind.layer(3, 4, batch_first=True)
        self.cell = kind.step_module(4, 5)

    def forward(self, x):
        output, states = self.layer(x)
        return output, states, self.cell(output[:, -1])


def reloaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def same_gradients(ours, theirs, *inputs):
    """Asserts that two modules return equal results and compute equal parameter gradients."""
    for module in (ours, theirs):
        module.zero_grad()
        results = tree_leaves(module(*inputs))
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@pytest.mark.drop_in
@pytest.mark.parametrize("how", [pytest.param("script", marks=pytest.mark.slow), "trace"])
@pytest.mark.parametrize("tokens", [False, True])
def test_torchscript_programs_accept_other_shapes(kind, tokens, how):
    """A TorchScript program shares its model's parameters, and accepts input of other shapes."""
    model, inputs = (kind.tokens(7, 3, 4), IDS) if tokens else (Model(kind), XS)
    wanted = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    program = torch.jit.script(model) if how == "script" else torch.jit.trace(model, inputs[0])
    assert {p.data_ptr() for p in program.parameters()} == {
        p.data_ptr() for p in model.parameters()
    }
    for input in inputs:
        same_gradients(reloaded(program), wanted, input)
    if not tokens:
        replace_rnn(model)  # torch.jit.script puts torch's own layers into the model
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.drop_in
@pytest.mark.parametrize("what", ["layer", "step_module"])
def test_single_module_can_be_traced_and_scripted(kind, what):
    module = getattr(kind, what)(3, 4)
    program = torch.jit.trace(module, torch.randn(6, 3))
    x = torch.randn(9, 3)
    torch.testing.assert_close(reloaded(program)(x), module(x))
    assert isinstance(torch.jit.script(module), torch.jit.ScriptModule)


@pytest.mark.drop_in
def test_traced_layer_accepts_other_batch_sizes(kind):
    module = OnRows(kind.layer(3, 4))
    long, short = (pack_padded_sequence(torch.randn(6, 2, 3), ends) for ends in ([6, 5], [6, 2]))
    program = torch.jit.trace(module, long[:2])
    torch.testing.assert_close(program(*short[:2]), module(*short[:2]))


def test_tracing_with_lengths_requires_torch_no_grad(kind):
    module = WithLengths(kind.layer(3, 4))
    x, lengths = torch.randn(6, 2, 3), torch.tensor([4, 6])
    with pytest.raises(RuntimeError, match=r"trace the call under torch\.no_grad\(\)"):
        torch.jit.trace(module, (x, lengths))
    with pytest.raises(RuntimeError, match="use dynamo=True"):
        torch.onnx.export(module, (x, lengths), io.BytesIO(), dynamo=False)
    with torch.no_grad():
        program = torch.jit.trace(module, (x, lengths))
        x, lengths = torch.randn(8, 3, 3), torch.tensor([8, 0, 1])
        torch.testing.assert_close(program(x, lengths), module(x, lengths))


class WithResets(OnRows):
    """Calls a layer with `reset` and `reset_to`."""

    def forward(self, x, reset, reset_to):
        return self.layer(x, reset=reset, reset_to=reset_to)


def test_traced_resets_accept_other_shapes(kind):
    def call(seq_len, batch):
        after = kind.states(torch.randn, seq_len, 1, batch, 4)
        return torch.randn(seq_len, batch, 3), torch.rand(seq_len, batch) < 0.4, after

    module, other = WithResets(kind.layer(3, 4)), call(8, 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        program = torch.jit.trace(module, call(6, 2))
        torch.testing.assert_close(program(*other), module(*other))


@pytest.mark.drop_in
@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, XS[0])])
@pytest.mark.parametrize("of_module", [True, False])
def test_torchscript_rejects_batch_invariance(kind, compiler, of_module):
    module = kind.layer(3, 4, batch_invariant=of_module)
    with (
        batch_invariant(not of_module),
        pytest.raises(RuntimeError, match="batch_invariant needs the fused kernel"),
    ):
        compiler(module)


@pytest.mark.drop_in
def test_scripting_does_not_change_subclasses(kind):
    class Zero(kind.step_module):
        def forward(self, input):
            return input * 0

    model = nn.Sequential(Zero(3, 4))
    assert not torch.jit.script(model)(XS[0]).any()
    assert type(model[0]) is Zero


@pytest.mark.drop_in
def test_traces_without_a_kernel_do_not_fix_the_sequence_length(kind, monkeypatch):
    """Without a kernel, a trace works at any sequence length, or tracing raises an error."""
    monkeypatch.setattr("namernn_fast.machine.availability.HAS_EXTENSION", False)
    module = kind.layer(3, 4, batch_first=True)
    torch.testing.assert_close(torch.jit.trace(module, XS[0])(XS[1]), module(XS[1]))

    module, arguments = WithLengths(kind.layer(3, 4)), (torch.randn(6, 2, 3), torch.tensor([4, 6]))
    with torch.no_grad():
        if kind.without_kernel == "reference":
            with pytest.raises(RuntimeError, match="record the loop over ATen operators"):
                torch.jit.trace(module, arguments)
            return
        program = torch.jit.trace(module, arguments)
        for other in ((torch.randn(8, 3, 3), torch.tensor([8, 0, 1])), arguments):
            torch.testing.assert_close(program(*other), module(*other))


def per_sample(module, input, **more):
    """Calls a module so that the backward pass computes per-sample gradients."""
    # Import these late: the package must be loaded before torch first imports expanded weights.
    from torch._decomp import decomposition_table
    from torch.nn.utils._expanded_weights import expanded_weights_impl
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    # If expanded weights were first imported by an ONNX export, they use torch's export-only loops.
    # With these loops, nn.GRU and nn.LSTM get no gradients.
    for function in (torch.gru, torch.lstm):
        operator = getattr(torch.ops.aten, function.__name__)
        loops = tuple(decomposition_table[getattr(operator, name)] for name in ("input", "data"))
        expanded_weights_impl.expanded_weights_rnn_decomps[function] = loops
    return call_for_per_sample_grads(module, batch_size=len(input))(input, **more)


@pytest.mark.drop_in
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [False, True])
def test_expanded_weights_sum_to_the_batch_gradient(kind, tokens):
    """Torch's per-sample gradients work, although torch has rules only for its own operators."""
    module = kind.layer(3, 4, 2, batch_first=True, bidirectional=True)
    x = torch.randn(5, 6, 3, requires_grad=True)  # otherwise nn.LSTM would run oneDNN's operator
    if tokens:
        module, x = kind.tokens(7, 3, 4, 2, batch_first=True), torch.randint(7, (5, 6))
    per_sample(module, x)[0].sum().backward()
    sample_grads = {name: p.grad_sample for name, p in module.named_parameters()}
    module(x)[0].sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(sample_grads[name].sum(0), parameter.grad)


@pytest.mark.drop_in
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("invariant", "more", "text"),
    [
        (False, {"reset": torch.zeros(2, 6) > 0}, "no rule for lengths= or reset="),
        (True, {}, "batch_invariant needs the fused kernel"),
    ],
)
def test_expanded_weights_reject_unsupported_options(kind, invariant, more, text):
    module = kind.layer(3, 4, batch_first=True, batch_invariant=invariant)
    with pytest.raises(RuntimeError, match=text):
        per_sample(module, XS[0], **more)


@pytest.mark.drop_in
@pytest.mark.parametrize("with_hx", [False, True])
def test_older_onnx_exporter_exports_a_layer(kind, with_hx):
    """This exporter passes all arguments by position, so layers must accept them by position."""
    onnxruntime = pytest.importorskip("onnxruntime")
    module, file = kind.layer(3, 4, batch_first=True), io.BytesIO()
    hx = [kind.states(torch.randn, 1, 2, 4)] * with_hx
    names = ["x", "hx", "cx"][: len(tree_leaves((XS[0], *hx)))]
    torch.onnx.export(
        module,
        (XS[0], *hx),
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes={name: [0, 1] if name == "x" else [1] for name in names},
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    x = XS[1][:2]
    feed = zip(names, tree_leaves((x, *hx)), strict=True)
    got = session.run(None, {name: value.numpy() for name, value in feed})
    for value, wanted in zip(got, tree_leaves(module(x, *hx)), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted.detach())


@pytest.mark.parametrize("what", ["layer", "step_module", "tokens"])
def test_fx_treats_fused_modules_as_leaves(kind, what):
    """Hooks of a leaf run once, and `restore_rnn` may replace the leaf in the traced graph."""
    cls = getattr(kind, what)
    module, x = (cls(13, 3, 4), IDS[0]) if what == "tokens" else (cls(3, 4), XS[0][0])
    model = nn.Sequential(module)
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(restore_rnn(graph)(x), replace_rnn(graph)(x))


@pytest.mark.drop_in
def test_fx_traces_into_subclasses_as_with_nn_rnn(kind):
    class Twice(kind.layer):
        def forward(self, input):
            return super().forward(input)[0] * 2

    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(nn.Sequential(Twice(3, 4)))


def test_fx_records_hx_and_lengths(kind):
    class WithHx(OnRows):
        def forward(self, x, hx, lengths):
            return self.layer(x, hx, lengths=lengths), self.layer(XS[0].transpose(0, 1), hx)

    module = WithHx(kind.layer(3, 4))
    arguments = torch.randn(6, 2, 3), kind.states(torch.randn, 1, 2, 4), torch.tensor([4, 6])
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(*arguments), module(*arguments))


@pytest.mark.drop_in
@pytest.mark.filterwarnings("ignore")
def test_quantization_skips_fused_modules(kind):
    """FX quantization skips fused modules; dynamic quantization converts only restored modules."""
    from torch.ao.nn.quantized import dynamic as quantized
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = nn.Sequential(kind.layer(3, 4)).eval()
    mapping = get_default_qconfig_mapping()
    converted = convert_fx(prepare_fx(model, mapping, (XS[0],)))
    torch.testing.assert_close(converted(XS[1]), model(XS[1]))
    model = nn.Sequential(kind.step_module(3, 4), kind.layer(3, 4)).eval()
    assert [type(module) for module in quantize_dynamic(model)] == [kind.step_module, kind.layer]
    cell, layer = quantize_dynamic(restore_rnn(copy.deepcopy(model)))
    assert type(cell) is getattr(quantized, kind.nn_step_module.__name__)
    assert type(layer) is {"rnn": nn.RNN, "gru": quantized.GRU, "lstm": quantized.LSTM}[kind.name]
    torch.testing.assert_close(cell(XS[0][0]), model[0](XS[0][0]), rtol=0, atol=0.05)
    torch.testing.assert_close(layer(XS[0]), model[1](XS[0]), rtol=0, atol=0.05)
