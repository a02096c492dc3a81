"""Tests replacing, constructing and explaining modules, and their functional forms."""

import inspect
import re
import warnings

import pytest
import torch
from kinds import DROP_INS, KINDS, flat, for_variants, map_states, states_of, tensors_in
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map_only

from namernn_fast import (
    FusedRNN,
    batch_invariant,
    explain,
    last_state,
    ops,
    replace_rnn,
    restore_rnn,
    rnn,
)
from namernn_fast.cells.cell import Cell, Parameter, usual_parameters
from namernn_fast.machine import availability
from namernn_fast.nn.base.layer import CustomLayer
from namernn_fast.nn.base.step_module import CustomStepModule
from namernn_fast.nn.inference import direct


@pytest.mark.drop_in
@pytest.mark.parametrize("every", [True, False])
def test_replace_rnn_warns_if_there_is_nothing_to_replace(kind, every):
    custom = type("Custom", (kind.nn_layer,), {})
    subclasses = torch.nn.Sequential(custom(2, 3), custom(3, 3))
    cells = {} if every else {"cells": (kind.name,)}
    classes = [
        c for k in (DROP_INS.values() if every else [kind]) for c in (k.nn_layer, k.nn_step_module)
    ]
    names = ", ".join(f"nn.{cls.__name__}" for cls in classes)
    for model, words in (
        (torch.nn.Linear(2, 3), f"the Linear has none of {names}$"),
        (subclasses, f"the Sequential has none of {names}, only subclasses: Custom$"),
    ):
        with pytest.warns(UserWarning, match=words) as warned:
            assert replace_rnn(model, **cells) is model
        assert len(warned) == 1
        assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        replace_rnn(replace_rnn(kind.nn_layer(2, 3)), cells=(kind.name,))


@pytest.mark.drop_in
@pytest.mark.parametrize("beside", [False, True])
def test_replace_rnn_warns_about_torchscript_modules(kind, beside):
    model = torch.nn.Sequential(torch.jit.script(torch.nn.Sequential(kind.nn_layer(3, 4))))
    if beside:
        model.append(kind.nn_layer(3, 4))
    words = r"cannot change modules of TorchScript, and left these as they are: 0\.0\. Call it"
    with pytest.warns(UserWarning, match=words) as warned:
        replace_rnn(model)
    assert [w.filename for w in warned if w.category is UserWarning] == [__file__]
    assert not beside or type(model[1]) is kind.layer
    with pytest.warns(UserWarning, match=f"left these as they are: {kind.nn_layer.__name__}"):
        replace_rnn(torch.jit.script(kind.nn_layer(3, 4)))


@pytest.mark.drop_in
def test_replace_rnn_changes_only_classes_and_restore_rnn_undoes_it(kind):
    model = torch.nn.ModuleDict(
        {
            "encoder": torch.nn.Sequential(kind.nn_layer(3, 4, batch_first=True)),
            "cell": kind.nn_step_module(4, 4),
            "custom": type("Custom", (kind.nn_layer,), {})(4, 4),
            "head": torch.nn.Linear(2, 2),
        }
    ).eval()
    calls, x = [], torch.ones(2, 5, 3)
    layer = model.encoder[0]
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer.weight_hh_l0.requires_grad_(False)
    parameters, wanted = dict(model.named_parameters()), model.encoder(x)
    plain = {name: type(module) for name, module in model.named_modules()}
    attributes = set(vars(layer))
    fused = plain | {"encoder.0": kind.layer, "cell": kind.step_module}
    for change, classes in ((replace_rnn, fused), (restore_rnn, plain)):
        assert change(model) is model
        assert {name: type(module) for name, module in model.named_modules()} == classes
        after = dict(model.named_parameters())
        assert after.keys() == parameters.keys()
        assert all(after[name] is parameters[name] for name in after)
        assert not model.encoder[0].training
        torch.testing.assert_close(model.encoder(x), wanted)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
            change([model])
    assert calls == ["hook"] * 3
    assert type(replace_rnn(kind.nn_layer(2, 3))) is kind.layer
    restored = restore_rnn(kind.layer(3, 4, batch_invariant=True))
    assert set(vars(restored)) == attributes


@pytest.mark.drop_in
def test_replace_rnn_replaces_only_the_requested_cells(kind):
    pairs = {
        name: torch.nn.Sequential(other.nn_layer(3, 4), other.nn_step_module(3, 4))
        for name, other in DROP_INS.items()
    }
    for options, replaced in (({"cells": (kind.name,)}, {kind.name}), ({}, {*DROP_INS})):
        replace_rnn(torch.nn.ModuleDict(pairs), **options)
        for name, other in DROP_INS.items():
            fused, plain = (other.layer, other.step_module), (other.nn_layer, other.nn_step_module)
            assert (*map(type, pairs[name]),) == (fused if name in replaced else plain)


@pytest.mark.kinds(*KINDS, "gru_equation")
def test_initial_weights_match_torchs_modules(kind):
    for ours, theirs, arguments in (
        (kind.layer, kind.nn_layer, {"num_layers": 2, "bidirectional": True}),
        (kind.step_module, kind.nn_step_module, {}),
    ):
        states = []
        for cls in (ours, theirs):
            torch.manual_seed(5)
            states.append(cls(3, 4, **arguments).state_dict())
        assert list(states[0]) == list(states[1])
        assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.drop_in
@pytest.mark.parametrize("bias", [True, False])
def test_declared_parameters_match_torchs_parameters(kind, bias):
    for proj_size in (0, 2) if kind.cell.can_project else (0,):
        options = {"proj_size": proj_size} if proj_size else {}
        theirs = kind.nn_layer(3, 5, 2, bias=bias, bidirectional=True, **options)
        bits = ops.BIDIRECTIONAL | ops.BIAS * bias | (ops.PROJECTIONS if proj_size else 0)
        described = [*ops.parameters_and_shapes(kind.cell, bits, 2, 3, 5, proj_size or 5)]
        assert [shape for _, shape in described] == [weight.shape for weight in theirs.parameters()]
        for (parameter, _), (name, _) in zip(described, theirs.named_parameters(), strict=True):
            assert name.rpartition("_l")[0] == parameter.name == parameter.role


def test_custom_cells_get_the_parameters_that_they_declare():
    """The test uses a cell with two gates and an additional parameter, `scale`."""
    scale = Parameter("scale", ("hidden",), init=lambda value, size: torch.full((size,), value))
    twofold = Cell("twofold", -1, "Twofold", 2, 0, None, usual_parameters(scale))
    layer_class = type("Twofold", (CustomLayer,), {"_cell": twofold})
    step_class = type("TwofoldCell", (CustomStepModule,), {"_cell": twofold})
    own = {"bias": False, "scale": 2.0, "train_scale": False}
    of_step = {"weight_ih": (10, 3), "weight_hh": (10, 5), "scale": (5,)}
    shapes = {f"{name}_l0": shape for name, shape in of_step.items()}
    shapes |= {"weight_ih_l1": (10, 5), "weight_hh_l1": (10, 5), "scale_l1": (5,)}
    layer = layer_class(input_size=3, hidden_size=5, num_layers=2, **own)
    step_module = step_class(3, 5, **own)
    for module, wanted in ((layer, shapes), (step_module, of_step)):
        assert {name: tuple(weight.shape) for name, weight in module.named_parameters()} == wanted
    before = [weight.clone() for weight in step_module.parameters()]
    step_module.reset_parameters()
    kept = map(torch.equal, before, step_module.parameters())
    assert [*kept] == [False, False, True]
    assert step_module.scale.tolist() == [2.0] * 5


def test_the_signature_names_every_parameter(kind):
    """`help(FusedRNN)` names every parameter; `help(nn.RNN)` shows (*args, **kwargs)."""
    parameters = inspect.signature(kind.classes[0]).parameters.values()
    names = {found.name for found in parameters}
    assert {"num_layers", "bidirectional", "device"} <= names
    assert ("nonlinearity" in names) == kind.has_nonlinearity
    assert not any(found.kind is inspect.Parameter.VAR_POSITIONAL for found in parameters)


@for_variants
def test_functional_forms_match_the_layer(kind, path):
    options = {"bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
    options |= kind.known({"nonlinearity": kind.cell.nonlinearities[-1]})
    layer = kind.layer(3, 4, 2, **options)
    x, hx, weights = torch.randn(2, 5, 3), kind.states(torch.randn, 4, 2, 4), [*layer.parameters()]
    more = {"noise": torch.randn(2, 5, 16)} if kind.cell.inputs else {}
    of_last = {"cell": kind.passed} | ({"projections": True} if kind.bits else {})
    for training in (True, False):
        layer.train(training)
        options["training"] = training
        torch.manual_seed(1)
        wanted = flat(layer(x, hx, **more))
        torch.manual_seed(1)
        got = flat(kind.run(x, hx, weights, **options, **more))
        assert all(map(torch.equal, got, wanted))
        torch.manual_seed(1)
        last = last_state(x, hx, weights, **of_last, **options, **more)
        torch.testing.assert_close(tensors_in(last), wanted[1:])
    with pytest.raises(ValueError, match=r"weights must hold . tensors for each layer .* got"):
        kind.run(x, None, weights[:-1], **options)


def test_functional_form_rejects_unknown_nonlinearities():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'gelu'"):
        rnn(torch.randn(5, 2, 3), None, [*FusedRNN(3, 4).parameters()], nonlinearity="gelu")


def test_explain_names_the_path_and_the_reasons(kind):
    module = kind.layer(3, 4)
    x = torch.randn(5, 2, 3)
    explained = explain(module, x)
    assert explained.path == f"cpu {ops.cpu_kernel()}"
    assert explained.why_not.keys() == {"reference"}
    assert str(explained).startswith(explained.path)
    packed = pack_padded_sequence(x, [5, 3])
    assert explain(module, packed) == explained
    assert explain(module.half(), x.half()).path == explained.path
    exotic = torch.float8_e4m3fn
    explained = explain(
        kind.layer(3, 4, dtype=exotic, device="meta").to_empty(device="cpu"), x.to(exotic)
    )
    assert explained.path == kind.without_kernel
    assert explained.why_not == {
        "cpu": f"the CPU kernel takes 16- to 64-bit floating-point types, not {exotic}"
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ([1.0],),
        (torch.zeros(5, 2, 3).double(),),
        (torch.zeros(5, 2, 4),),
        (torch.zeros(5, 2, 3, device="meta"),),
        (torch.zeros(5, 2, 3), torch.zeros(1, 2, 5)),
    ],
    ids=["list", "dtype", "features", "device", "hx"],
)
def test_explain_raises_the_same_error_as_the_call(kind, arguments):
    input, *states = arguments
    module = kind.layer(3, 4)
    arguments = (input, *(states_of(kind, state) for state in states))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        module(*arguments)
    with pytest.raises(raised.type, match=re.escape(str(raised.value))):
        explain(module, *arguments)


@pytest.mark.drop_in
@pytest.mark.parametrize(
    ("kernels", "rows", "features", "fused"),
    [
        (("avx512", "avx512_bf16"), 64, 64, True),
        (("avx512", "avx512_bf16"), 64, 16, False),  # fewer than 2**19 multiply-adds
        (("avx512", "avx512_bf16"), 1, 1024, False),
        (("avx2", "avx2"), 1, 256, False),
        (("avx2", "avx2"), 1, 257, False),
        (("avx512", "amx"), 8, 512, True),
        (("avx512", "amx"), 7, 512, False),
        (("avx512", "avx512"), 16, 512, True),
        (("avx512", "avx512"), 17, 512, False),
        (("avx2", "avx2"), 8, 512, True),
        (("avx2", "avx2"), 8, 511, False),
        (("baseline", "baseline"), 8, 512, False),
    ],
)
def test_a_step_runs_the_path_that_was_measured_as_faster(
    kind, kernels, rows, features, fused, monkeypatch
):
    """The path depends on size, dtype and instruction set, not on the number of threads."""
    if not availability.HAS_EXTENSION:
        pytest.skip("the C++ extension was not built")
    for name, value in zip(("KERNEL", "BFLOAT16_KERNEL"), kernels, strict=True):
        monkeypatch.setattr(direct, name, value)
    cell, x = kind.step_module(features, features), torch.randn(rows, features)
    fused_kernel = f"cpu {ops.cpu_kernel()}"
    explained = explain(cell, x)
    if kind.gates > 1 and features <= 256 and kernels[0] != "baseline":
        assert explained.path == fused_kernel
        reason = "torch's own cell is slower for a single step of this size on this processor"
        assert explained.why_not == {"torch": reason}
    else:
        assert explained.path == "torch"
        slower = "torch's own cell is as fast for a single step"
        assert explained.why_not["cpu"].startswith(slower)
    with torch.no_grad():
        directly = kernels[0] != "baseline" and (rows <= 16 or features <= 128)
        assert (explain(cell, x).path == fused_kernel) == (directly or (kind.gates > 1 and fused))
    assert explain(cell.half(), x.half()).path == "torch"
    assert explain(cell.float(), x[0]).path == "torch"
    with torch.no_grad(), batch_invariant():
        explained = explain(cell, x)
        assert explained.path == fused_kernel
        assert explained.why_not == {"torch": "torch's own cell is not batch-invariant"}


@pytest.mark.drop_in
def test_explain_suggests_replace_rnn_for_torchs_modules(kind):
    for module in (kind.nn_layer(3, 4), kind.nn_step_module(3, 4)):
        with pytest.raises(TypeError, match=r"got \w+: replace_rnn makes it one$"):
            explain(module, torch.randn(5, 3))
    with pytest.raises(TypeError, match=r"a fused or prepared layer, cell or .*, got Linear$"):
        explain(torch.nn.Linear(3, 4), torch.randn(5, 3))


@pytest.mark.drop_in
def test_16_bit_steps_run_torchs_cell(kind, fused_steps):
    explained = explain(kind.step_module(64, 64).half(), torch.randn(64, 64).half())
    reason = "torch's own cell is as fast for a single step"
    if kind.gates > 1:
        reason = "in 16 bits torch's own cell is faster for some sizes"
    assert explained[:4] == ("torch", {"cpu": reason}, (), {})


def test_explain_names_the_path_without_a_kernel(kind, monkeypatch):
    """GRUs and LSTMs run torch's own operator, except with resets or forward-mode AD."""
    module, x = kind.layer(3, 4), torch.randn(5, 2, 3)
    on_meta = {"cpu": "the CPU kernel does not run on meta"}
    explained = explain(kind.layer(3, 4, device="meta"), x.to("meta"))
    assert explained[:4] == (kind.without_kernel, on_meta, (), {})
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    missing = {"cpu": "the C++ extension was not built"}
    explained = explain(module, x)
    assert (explained.path, explained.why_not) == (kind.without_kernel, missing)
    resetting = explain(module, x, reset=torch.zeros(5, 2, dtype=torch.bool))
    assert resetting.path == "reference"
    transform = "a torch.func transform other than vmap, or forward-mode AD, is active"
    with forward_ad.dual_level():
        forward = explain(module, x)
    assert forward.path == "reference"
    if kind.without_kernel == "reference":
        assert resetting.why_not == missing
        assert forward.why_not == {"cpu": transform}
    else:
        assert resetting.why_not == missing | {"torch": "torch's operator has no reset"}
        no_rule = "torch's operator has no rule for this transform"
        assert forward.why_not == {"cpu": transform, "torch": no_rule}
        assert str(resetting).endswith("; not torch: torch's operator has no reset)")


class Wrapped:
    """An object that torch's functions accept like a tensor, through `__torch_function__`."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda wrapped: wrapped.tensor, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))


@pytest.mark.drop_in
def test_input_may_implement_torch_function(kind):
    module, x = kind.layer(3, 4), torch.randn(5, 2, 3)
    for got, wanted in zip(flat(module(Wrapped(x))), flat(module(x)), strict=True):
        assert type(got) is Wrapped
        torch.testing.assert_close(got.tensor, wanted)
    hx = kind.states(torch.ones, 1, 2, 4)
    _, last = module(x, map_states(hx, Wrapped))
    torch.testing.assert_close(map_states(last, lambda state: state.tensor), module(x, hx)[1])
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got Wrapped"):
        module(Wrapped(x), lengths=[5, 3])


def test_the_mode_attribute_selects_the_nonlinearity():
    ours, theirs = KINDS["rnn"].twins(3, 4)
    for name, value in (("mode", "RNN_RELU"), ("nonlinearity", "tanh")):
        for module in (ours, theirs):
            setattr(module, name, value)
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(ours(x), theirs(x))
