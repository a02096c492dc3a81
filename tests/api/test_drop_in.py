"""What programs written for `nn.RNN` do with a layer, beyond calling it: it must work here too."""

import copy
import io

import numpy as np
import pytest
import torch
from cases import every_other
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from namernn_fast import FusedRNN, FusedRNNCell, batch_invariant, replace_rnn, restore_rnn, rnn


class Model(nn.Module):
    """A layer and a cell within a model."""

    def __init__(self):
        super().__init__()
        self.layer = FusedRNN(3, 4, batch_first=True)
        self.cell = FusedRNNCell(4, 5)

    def forward(self, x):
        output, h_n = self.layer(x)
        return output, self.cell(h_n[0])


class Packed(nn.Module):
    """A layer whose input is packed."""

    def __init__(self):
        super().__init__()
        self.layer = FusedRNN(3, 4)

    def forward(self, data, batch_sizes):
        output, h_n = self.layer(PackedSequence(data, batch_sizes))
        return output.data, h_n


def reloaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def same_gradients(ours, theirs, *inputs):
    """Asserts that two modules have equal results and gradients of parameters of equal names."""
    for module in (ours, theirs):
        module.zero_grad()
        results = module(*inputs)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    torch.testing.assert_close(ours(*inputs), theirs(*inputs))
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, XS[0])])
def test_torchscript(compiler):
    """A traced or scripted model shares its parameters, and works at other lengths when loaded."""
    model = Model()
    wanted = copy.deepcopy(model)
    program = compiler(model)
    assert {p.data_ptr() for p in program.parameters()} == {
        p.data_ptr() for p in model.parameters()
    }
    for x in XS:
        same_gradients(reloaded(program), wanted, x)
    replace_rnn(model)  # torch.jit.script leaves what it compiled in the model
    assert type(model.layer) is FusedRNN
    assert type(model.cell) is FusedRNNCell


XS = torch.randn(2, 6, 3), torch.randn(5, 9, 3)


@pytest.mark.parametrize("cls", [FusedRNN, FusedRNNCell])
def test_tracing_of_the_module_itself(cls):
    module = cls(3, 4)
    program = torch.jit.trace(module, torch.randn(6, 3))
    x = torch.randn(9, 3)
    torch.testing.assert_close(reloaded(program)(x), module(x))
    assert isinstance(torch.jit.script(module), torch.jit.ScriptModule)


def test_tracing_of_packed_input():
    module = Packed()
    long, short = (pack_padded_sequence(torch.randn(6, 2, 3), ends) for ends in ([6, 5], [6, 2]))
    program = torch.jit.trace(module, long[:2])
    torch.testing.assert_close(program(*short[:2]), module(*short[:2]))


def test_tracing_with_lengths_is_for_inference():
    class WithLengths(Packed):
        def forward(self, x, lengths):
            return self.layer(x, lengths=lengths)

    module = WithLengths()
    x, lengths = torch.randn(6, 2, 3), torch.tensor([4, 6])
    with pytest.raises(RuntimeError, match=r"trace it under torch\.no_grad\(\)"):
        torch.jit.trace(module, (x, lengths))
    with pytest.raises(RuntimeError, match="use dynamo=True"):
        torch.onnx.export(module, (x, lengths), io.BytesIO(), dynamo=False)
    with torch.no_grad():
        program = torch.jit.trace(module, (x, lengths))
        other = torch.randn(8, 3, 3), torch.tensor([8, 0, 1])
        torch.testing.assert_close(program(*other), module(*other))


def test_torchscript_refuses_batch_invariance():
    module = FusedRNN(3, 4, batch_invariant=True)
    for compiler in (torch.jit.script, lambda m: torch.jit.trace(m, XS[0])):
        with pytest.raises(RuntimeError, match="batch_invariant needs the fused kernel"):
            compiler(module)


@pytest.mark.filterwarnings("ignore")
def test_expanded_weights():
    """Torch's own gradients of each sample, which know the operators of `nn.RNN` alone."""
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    module = FusedRNN(3, 4, 2, batch_first=True, bidirectional=True)
    x = torch.randn(5, 6, 3)
    call_for_per_sample_grads(module, batch_size=5)(x)[0].sum().backward()
    of_samples = {name: p.grad_sample for name, p in module.named_parameters()}
    module(x)[0].sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(of_samples[name].sum(0), parameter.grad)
    for options, text in (
        ({"reset": torch.zeros(5, 6, dtype=torch.bool)}, "no rule for lengths= or reset="),
        ({}, "batch_invariant needs the fused kernel, but torch's expanded weights"),
    ):
        for parameter in module.parameters():
            parameter.grad_sample = None
        module.batch_invariant = not options
        with pytest.raises(RuntimeError, match=text):
            call_for_per_sample_grads(module, batch_size=5)(x, **options)


@pytest.mark.parametrize("with_hx", [False, True])
def test_older_onnx_exporter(with_hx):
    """It hands the parameters of a module that is exported by itself over by position."""
    onnxruntime = pytest.importorskip("onnxruntime")
    module, file = FusedRNN(3, 4, batch_first=True), io.BytesIO()
    hx = [torch.randn(1, 2, 4)] * with_hx
    names = ["x", "hx"][: 1 + with_hx]
    torch.onnx.export(
        module,
        (XS[0], *hx),
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes={"x": [0, 1], "hx": [1]},
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    x = XS[1][:2]
    got = session.run(None, {k: v.numpy() for k, v in zip(names, (x, *hx), strict=True)})
    for value, wanted in zip(got, module(x, *hx), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), wanted.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "module", [FusedRNN(3, 4), FusedRNNCell(3, 4)], ids=lambda m: type(m).__name__
)
def test_modules_are_leaves_of_fx(module):
    graph = torch.fx.symbolic_trace(nn.Sequential(module))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(6, 3)
    torch.testing.assert_close(graph(x), module(x))
    with pytest.raises(torch.fx.proxy.TraceError, match="trace a module that contains it"):
        torch.fx.symbolic_trace(module)


def test_fx_records_hx_and_lengths():
    class WithLengths(Packed):
        def forward(self, x, hx, lengths):
            return self.layer(x, hx, lengths=lengths)

    module = WithLengths()
    given = torch.randn(6, 2, 3), torch.randn(1, 2, 4), torch.tensor([4, 6])
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(*given), module(*given))


def test_quantization():
    """FX quantization passes the layer by; dynamic quantization knows the restored cell."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = nn.Sequential(FusedRNN(3, 4)).eval()
    mapping = get_default_qconfig_mapping()
    converted = convert_fx(prepare_fx(model, mapping, (XS[0],)))
    torch.testing.assert_close(converted(XS[1]), model(XS[1]))
    model = nn.Sequential(FusedRNNCell(3, 4))
    dynamic = quantize_dynamic(restore_rnn(model), dtype=torch.qint8)
    assert type(dynamic[0]) is torch.ao.nn.quantized.dynamic.RNNCell


@pytest.mark.parametrize("change", [torch.relu_, lambda o: o[0].zero_(), nn.Dropout(inplace=True)])
def test_in_place_change_of_output_is_an_error_that_says_what_to_do(change):
    output, _ = FusedRNN(3, 4)(XS[0])
    change(output)
    with pytest.raises(RuntimeError, match=r"Change a copy: output\.clone\(\)"):
        output.sum().backward()


@pytest.mark.parametrize("names", [("bias_ih_l0", "bias_hh_l1"), ("weight_ih_l0",)])
def test_in_place_change_of_what_the_gradient_does_not_need(names):
    """As with `nn.RNN`, a bias and the first weight_ih may change before the backward pass."""
    ours, theirs = FusedRNN(3, 4, 2), nn.RNN(3, 4, 2)
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        output, _ = module(XS[0])
        with torch.no_grad():
            for name in names:
                getattr(module, name).add_(1)
        output.sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    output, _ = ours(XS[0])
    with torch.no_grad():
        getattr(ours, names[0]).add_(1)
    with pytest.raises(RuntimeError, match="changed in place since the forward pass"):
        torch.autograd.grad(output.sum(), ours.weight_hh_l0, create_graph=True)


def test_in_place_change_of_what_the_gradient_needs():
    ours = FusedRNN(3, 4, 2)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        output, _ = ours(XS[0])
        with torch.no_grad():
            getattr(ours, name).add_(1)
        with pytest.raises(RuntimeError, match="reads its output, its input, hx and weights"):
            output.sum().backward()
    output, _ = ours(XS[0].clone().requires_grad_())
    with torch.no_grad():
        ours.weight_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("packed", "bidirectional", "nonlinearity"),
    every_other((False, True), (False, True), ("tanh", "relu")),
)
def test_batched_gradients(packed, bidirectional, nonlinearity):
    """Gradients of several vectors at once, by autograd's own vmap and by torch.func's."""
    module = FusedRNN(2, 3, 2, nonlinearity, bidirectional=bidirectional, dtype=torch.float64)
    sizes = torch.tensor([3, 2, 1])
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def run(x):
        output, h_n = module(PackedSequence(x, sizes) if packed else x)
        return output.data if packed else output, h_n

    assert torch.autograd.gradcheck(run, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, x, check_batched_grad=True)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(run, x, vectorize=True), jacobian(run, x))
    output, _ = run(x)
    vectors = torch.randn(4, *output.shape, dtype=torch.float64)

    def pull_back(vector):
        return torch.autograd.grad(output, [x, *module.parameters()], vector, retain_graph=True)

    wanted = tuple(map(torch.stack, zip(*map(pull_back, vectors), strict=True)))
    torch.testing.assert_close(torch.vmap(pull_back)(vectors), wanted)
    batched = torch.autograd.grad(output, [x, *module.parameters()], vectors, is_grads_batched=True)
    torch.testing.assert_close(batched, wanted)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_masks_are_those_of_nn_rnn(batch_first, bidirectional, reset):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dropout": 0.5}
    ours, theirs = (cls(3, 16, 3, **options) for cls in (FusedRNN, nn.RNN))
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        more = {"reset": torch.zeros(2, 6, dtype=torch.bool)} if module is ours and reset else {}
        x = XS[0] if batch_first else XS[0].transpose(0, 1)
        if more and not batch_first:
            more = {"reset": more["reset"].t()}
        results.append(module(x, **more))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "lengths",
    [np.array([6, 0]), np.array([6, 0], np.uint8), (6, 0), torch.tensor([6, 0]).short(), [6, 0]],
    ids=lambda lengths: f"{type(lengths).__name__} {getattr(lengths, 'dtype', '')}",
)
def test_forms_of_lengths(lengths):
    module = FusedRNN(3, 4, batch_first=True)
    wanted = module(XS[0], lengths=torch.tensor([6, 0]))
    torch.testing.assert_close(module(XS[0], lengths=lengths), wanted)


@pytest.mark.parametrize("lengths", [(), [], np.array([]), torch.tensor([], dtype=torch.int64)])
def test_no_lengths_of_an_empty_batch(lengths):
    output, h_n = FusedRNN(3, 4)(torch.randn(6, 0, 3), lengths=lengths)
    assert output.shape == (6, 0, 4)
    assert h_n.shape == (1, 0, 4)


def test_lengths_of_other_types():
    for lengths in ([6.0, 1.0], np.array([6.0, 1.0]), torch.tensor([], dtype=torch.float32)):
        with pytest.raises(TypeError, match=r"lengths must be integers, got torch\.float"):
            FusedRNN(3, 4, batch_first=True)(XS[0], lengths=lengths)


@pytest.mark.parametrize("reference", [False, True])
def test_offsets_of_jagged_input(reference, monkeypatch):
    """Offsets of 32 bits are taken, and decreasing ones refused on both paths."""
    if reference:
        monkeypatch.setattr("namernn_fast.availability.HAS_EXTENSION", False)
    module, values = FusedRNN(3, 4), torch.randn(8, 3)
    results = [
        module(torch.nested.nested_tensor_from_jagged(values, offsets))
        for offsets in (torch.tensor([0, 5, 8]), torch.tensor([0, 5, 8], dtype=torch.int32))
    ]
    torch.testing.assert_close(results[0][0].values(), results[1][0].values())
    for offsets, text in (
        ([0, 5, 3, 8], "offsets must not decrease, got 3 after 5 at 2"),
        ([0, 5, 7], "offsets must begin with 0 and end with 8, the rows of data, got 0 and 7"),
    ):
        bad = torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets))
        with pytest.raises(RuntimeError, match=text):
            module(bad)


def test_flops_are_counted():
    """Forward, and backward where every gradient is wanted, have the counts of `nn.RNN`."""
    options = {"num_layers": 2, "bidirectional": True}
    counts = []
    for module in (FusedRNN(3, 4, **options), nn.RNN(3, 4, **options)):
        x, hx = torch.randn(6, 2, 3, requires_grad=True), torch.randn(4, 2, 4, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            output, _ = module(x, hx)
            forward = counter.get_total_flops()
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    layer = FusedRNN(3, 4)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(6, 2, 3), lengths=[2, 3])
        layer(pack_padded_sequence(torch.randn(6, 2, 3), [6, 1]))
    assert counter.get_total_flops() == 2 * (5 + 7) * 4 * (3 + 4)


def test_restoring():
    model = nn.Sequential(nn.RNN(3, 4), nn.RNNCell(3, 4), nn.Linear(2, 2))
    before, classes = dict(model.named_parameters()), [type(module) for module in model]
    wanted = model[0](XS[0])
    names = set(model[0].__dict__)
    replaced = replace_rnn(model)
    assert [type(module) for module in replaced] == [FusedRNN, FusedRNNCell, nn.Linear]
    assert restore_rnn(model) is model
    assert [type(module) for module in model] == classes
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    torch.testing.assert_close(model[0](XS[0]), wanted, rtol=0, atol=0)
    restored = restore_rnn(FusedRNN(3, 4, batch_invariant=True))
    assert set(restored.__dict__) == names
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        restore_rnn([model])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_cell_takes_the_kernel_in_inference_alone(nonlinearity, bias, monkeypatch):
    calls = []
    monkeypatch.setattr("namernn_fast.nn.rnn", lambda *a, **k: calls.append(a) or rnn(*a, **k))
    ours, theirs = (cls(3, 64, bias, nonlinearity) for cls in (FusedRNNCell, nn.RNNCell))
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(64, 3), torch.randn(64, 64)
    torch.testing.assert_close(ours(x, hx), theirs(x, hx), rtol=0, atol=0)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))
        torch.testing.assert_close(ours(x), theirs(x))
        assert len(calls) == 2
        ours(x[:63], hx[:63])
        assert len(calls) == 2
        with batch_invariant():
            assert torch.equal(ours(x, hx)[:1], ours(x[:1], hx[:1]))
            ours(x[0], hx[0])
        assert len(calls) == 5
    torch.testing.assert_close(torch.func.vmap(ours)(x[None], hx[None])[0], theirs(x, hx))
    assert len(calls) == 6, "torch's own cell has no rule for vmap"
