"""The modules as drop-in replacements: replacing, construction, functional form, `explain`."""

import inspect
import warnings

import pytest
import torch
from cases import twins
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map_only

import namernn_fast
from namernn_fast import FusedRNN, FusedRNNCell, batch_invariant, explain, replace_rnn, rnn


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.RNN(3, 4, batch_first=True))
        self.cell = torch.nn.RNNCell(4, 4)
        self.other = torch.nn.LSTM(4, 4)
        self.custom = type("Custom", (torch.nn.RNN,), {})(4, 4)


def test_replace_rnn_without_anything_to_replace():
    custom = type("Custom", (torch.nn.RNN,), {})
    for model, words in (
        (torch.nn.Linear(2, 3), "no nn.RNNCell in the Linear$"),
        (torch.nn.Sequential(custom(2, 3), custom(3, 3)), "only subclasses of them: Custom$"),
    ):
        with pytest.warns(UserWarning, match=words) as warned:
            assert replace_rnn(model) is model
        assert len(warned) == 1
    with warnings.catch_warnings(action="error"):
        replace_rnn(replace_rnn(torch.nn.RNN(2, 3)))


def test_replace_rnn_keeps_everything_but_the_class():
    model = Model().eval()
    calls = []
    model.encoder[0].register_forward_hook(lambda *_: calls.append("hook"))
    model.encoder[0].weight_hh_l0.requires_grad_(False)
    before = dict(model.named_parameters())
    wanted = model.encoder(torch.ones(2, 5, 3))
    assert replace_rnn(model) is model
    assert type(model.encoder[0]) is FusedRNN
    assert type(model.cell) is FusedRNNCell
    assert type(model.other) is torch.nn.LSTM
    assert type(model.custom) is not FusedRNN
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert not model.encoder[0].training
    torch.testing.assert_close(model.encoder(torch.ones(2, 5, 3)), wanted)
    assert calls == ["hook", "hook"]
    assert type(replace_rnn(torch.nn.RNN(2, 3))) is FusedRNN


def test_initialization():
    torch.manual_seed(5)
    theirs = torch.nn.RNN(3, 4, 2, bidirectional=True)
    torch.manual_seed(5)
    ours = FusedRNN(3, 4, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_the_signature_names_every_parameter():
    """`help(FusedRNN)` shows the signature; that of `nn.RNN` is (*args, **kwargs)."""
    parameters = inspect.signature(FusedRNN).parameters.values()
    assert {"nonlinearity", "bidirectional", "device"} <= {found.name for found in parameters}
    assert not any(found.kind is inspect.Parameter.VAR_POSITIONAL for found in parameters)


def test_proj_size_is_refused_as_by_nn_rnn():
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        FusedRNN(3, 4, proj_size=2)


@pytest.mark.parametrize("cls", [FusedRNN, FusedRNNCell])
def test_construction_without_initialization(cls):
    made = torch.nn.utils.skip_init(cls, 3, 4, bias=False, dtype=torch.float64)
    assert made.weight_hh.isnan().all() if cls is FusedRNNCell else made.weight_hh_l0.isnan().all()
    with torch.device("meta"):
        module = cls(3, 4)
    wanted = cls(3, 4)
    x = torch.randn(5, 3)
    module.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    torch.testing.assert_close(module(x), wanted(x), rtol=0, atol=0)
    with torch.device("meta"):
        module = cls(3, 4)
    module.load_state_dict(wanted.state_dict(), assign=True)
    torch.testing.assert_close(module(x), wanted(x), rtol=0, atol=0)


def test_functional_form():
    module = FusedRNN(3, 4, num_layers=2, bidirectional=True)
    x, hx = torch.randn(5, 2, 3), torch.randn(4, 2, 4)
    got = rnn(x, hx, list(module.parameters()), bidirectional=True)
    assert all(map(torch.equal, got, module(x, hx)))
    with pytest.raises(ValueError, match=r"weights must hold 4 tensors for each layer .* got 3"):
        rnn(x, None, list(module.parameters())[:3])
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        rnn(x, None, list(module.parameters()), nonlinearity="gelu")


def test_explain():
    module = FusedRNN(3, 4)
    x = torch.randn(5, 2, 3)
    explained = explain(module, x)
    assert explained.path == f"cpu {namernn_fast.ops.cpu_kernel()}"
    assert str(explained).startswith(explained.path)
    packed = pack_padded_sequence(x, [5, 3])
    assert explain(module, packed) == explained
    assert explain(module.half(), x.half()).path == explained.path
    assert explain(module, x.to("meta")).why_not == {"cpu": "the CPU kernel does not run on meta"}
    whole = explain(module, x.int())
    assert whole.path == "reference"
    assert whole.why_not == {
        "cpu": "the CPU kernel has floating-point types of 16 to 64 bits, not torch.int32"
    }
    step = explain(FusedRNNCell(64, 64), torch.randn(4, 64))
    assert step.path == "torch"
    assert step.why_not == {"cpu": "torch's own cell is as fast for a single step"}
    with torch.no_grad(), batch_invariant():
        step = explain(FusedRNNCell(64, 64), torch.randn(4, 64))
        assert step.path == f"cpu {namernn_fast.ops.cpu_kernel()}"
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got list"):
        explain(module, [1.0])


class Wrapped:
    """Not a tensor, but an object that torch's functions accept through `__torch_function__`."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda wrapped: wrapped.tensor, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


def test_input_with_torch_function():
    module, x = FusedRNN(3, 4), torch.randn(5, 2, 3)
    for got, wanted in zip(module(Wrapped(x)), module(x), strict=True):
        assert type(got) is Wrapped
        torch.testing.assert_close(got.tensor, wanted)
    hx = torch.ones(1, 2, 4)
    torch.testing.assert_close(module(x, Wrapped(hx))[1].tensor, module(x, hx)[1])
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got Wrapped"):
        module(Wrapped(x), lengths=[5, 3])


def test_the_mode_decides_as_in_nn_rnn():
    ours, theirs = twins(3, 4)
    for name, value in (("mode", "RNN_RELU"), ("nonlinearity", "tanh")):
        for module in (ours, theirs):
            setattr(module, name, value)
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(ours(x), theirs(x))
