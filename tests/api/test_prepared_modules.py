"""Tests saving, copying, converting, compiling, exporting and refreshing prepared modules."""

import copy
import io
import multiprocessing
import pickle
import warnings
from queue import SimpleQueue

import pytest
import torch
from kinds import for_variants, needs_extension
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map

from namernn_fast import (
    PreparedCell,
    PreparedLayer,
    batch_invariant,
    explain,
    ops,
    prepare_rnn,
    replace_rnn,
    restore_rnn,
)
from namernn_fast.machine import availability
from namernn_fast.nn.inference import prepared as prepared_module

pytestmark = [needs_extension, pytest.mark.covering(1)]

OPTIONS = {"num_layers": 2, "bidirectional": True, "batch_first": True}
for_dtypes = pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
"""Runs a test for weights in the layer's dtype, and for 8-bit weights."""


def make(kind, form):
    """Returns a module with an input for it."""
    if form == "layer":
        return kind.layer(6, 20, **OPTIONS), torch.randn(8, 5, 6)
    if form == "tokens":
        return kind.tokens(9, 6, 20, padding_idx=0, **OPTIONS), torch.randint(9, (8, 5))
    return kind.step_module(6, 20), torch.randn(8, 6)


def equal(first, second):
    """Returns whether results are bit-identical or, for step modules, equal up to rounding.

    Small step modules run torch's own cell, which rounds differently than the kernel.
    """
    if isinstance(second, tuple) and tree_leaves(second)[0].dim() == 3:
        return all(map(torch.equal, tree_leaves(first), tree_leaves(second)))
    eps = 8 * torch.finfo(tree_leaves(second)[0].dtype).eps
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.allclose(a, b, rtol=eps, atol=eps) for a, b in pairs)


@pytest.fixture(params=["layer", "tokens", "step module"])
def form(request):
    return request.param


@pytest.fixture
def dtype():
    """The dtype passed to `prepare`: None unless the test is marked `for_dtypes`."""
    return None


@pytest.fixture
def made(kind, form, dtype, fused_steps):
    """Returns a module, its prepared version, and an input."""
    module, x = make(kind, form)
    module.requires_grad_(False)
    return module, module.prepare(dtype), x


def test_a_prepared_module_matches_its_layer(made):
    module, prepared, x = made
    assert equal(prepared(x), module(x))
    assert [*prepared.parameters()] == [*prepared.buffers()] == [*prepared.children()] == []
    assert not prepared.training
    assert prepared.hidden_size == 20
    assert f"{type(module).__name__}(" in repr(prepared)
    prepared.flatten_parameters()
    with pytest.raises(AttributeError, match="weight_hh"):
        _ = prepared.weight_hh_l0


def test_calls_in_training_mode_raise_an_error(made):
    """If `train()` itself failed, only some modules of a model would change their mode."""
    _, prepared, x = made
    wanted = prepared(x)
    model = torch.nn.Sequential(torch.nn.Dropout(), prepared)
    assert model.train() is model
    assert all(module.training for module in model.modules())
    calls = [prepared, copy.deepcopy(prepared), torch.export.export]
    calls += [prepared.last_state] if isinstance(prepared, PreparedLayer) else []
    for call in calls:
        with pytest.raises(RuntimeError, match=r"is in training mode.*call its eval\(\)"):
            call(*((prepared, (x,)) if call is torch.export.export else (x,)))
    assert not prepared.restore().training
    assert equal(model.eval()[1](x), wanted)


def test_saving_writes_the_same_file_as_the_layer(made):
    module, prepared, _ = made
    files = [io.BytesIO(), io.BytesIO()]
    for file, saved in zip(files, (module, prepared), strict=True):
        torch.save(saved.state_dict(), file)
    assert files[0].getvalue() == files[1].getvalue()
    assert prepared.state_dict(prefix="a.").keys() == module.state_dict(prefix="a.").keys()


def test_loading_raises_the_same_errors_as_the_layer(kind, made, form):
    _, prepared, x = made
    wanted = prepared(x)
    state = make(kind, form)[0].state_dict()
    name, weight = state.popitem()
    with pytest.raises(RuntimeError, match="size mismatch"):
        prepared.load_state_dict({**state, name: weight[:-1]})
    assert equal(prepared(x), wanted)
    with pytest.raises(RuntimeError, match="Missing key"):
        prepared.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        prepared.load_state_dict({**state, name: weight, "more": weight})


@for_dtypes
def test_a_failed_load_leaves_the_module_unchanged(kind, made, form):
    """With `assign`, a wrong dtype is noticed only when the new weights are packed."""
    module, prepared, x = made
    wanted, state = prepared(x), prepared.state_dict()
    other = make(kind, form)[0].state_dict()
    name = [name for name in other if "weight_hh" in name][-1]
    other[name] = other[name].double()
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|float32"):
        prepared.load_state_dict(other, assign=True)
    assert equal(prepared(x), wanted)
    assert equal(copy.copy(prepared)(x), wanted)
    assert all(torch.equal(value, state[key]) for key, value in prepared.state_dict().items())
    prepared.refresh(module)


@for_dtypes
def test_copies_are_independent(kind, made, form):
    module, prepared, x = made
    wanted = prepared(x)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copies = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), copy.copy(prepared)]
    prepared.refresh(make(kind, form)[0])
    assert not equal(prepared(x), wanted)
    for each in (*copies, loaded):
        assert equal(each(x), wanted)
    # The file contains weights, names, shapes and options, but no packed weights.
    weight_bytes = sum(weight.nbytes for weight in module.parameters())
    assert len(pickle.dumps(copies[0])) < len(pickle.dumps(module)) + weight_bytes / 2


def test_conversion_to_the_same_dtype_does_not_pack_again(made, monkeypatch):
    """Because nothing is packed, another thread may call the module during the conversion."""
    _, prepared, _ = made
    monkeypatch.setattr(prepared, "_hold", None)
    prepared.to("cpu").float()


def test_devices_without_a_kernel_run_the_layer(kind, made):
    module, prepared, x = made
    wanted = prepared(x)
    prepared.to("meta")
    assert tree_leaves(prepared(x.to("meta")))[0].is_meta
    path = explain(prepared, x.to("meta")).path
    assert path in ("reference", "torch")
    prepared.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert equal(prepared(x), wanted)


@for_variants
def test_without_the_extension_the_layer_runs(kind, made, monkeypatch):
    module, prepared, x = made
    data = pickle.dumps(prepared)
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    for each in (pickle.loads(data), module.prepare()):
        torch.testing.assert_close(each(x), module(x))
        assert explain(each, x).path == explain(module, x).path


def send_results(queue, x, calls):
    queue.put([[*map(torch.Tensor.tolist, tree_leaves(call(x)))] for call in calls])


@pytest.mark.covering(0)
@pytest.mark.drop_in
def test_modules_and_streams_can_be_sent_to_a_spawned_process(kind):
    with torch.no_grad():
        layer = kind.layer(6, 20)
        model = torch.nn.Sequential(layer.prepare())
        stream = layer.prepare(None if kind.name == "rnn" else torch.int8).stream(5)
        x = torch.randn(5, 6)
        stream(x)
        calls = [model, kind.step_module(6, 20).prepare(), stream]
        queue = SimpleQueue()
        send_results(queue, x, [*calls[:2], stream.fork()])
        wanted = queue.get()
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        child = context.Process(target=send_results, args=(queue, x, calls))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        assert queue.get() == wanted


def test_prepared_modules_work_in_inference_mode(kind, form, fused_steps):
    with torch.inference_mode():
        module, x = make(kind, form)
        prepared = module.prepare()
        wanted = module(x)
        assert equal(prepared(x), wanted)
    assert equal(prepared(x), wanted)
    other = make(kind, form)[0]
    prepared.refresh(other)
    with torch.no_grad():
        assert equal(prepared(x), other(x))
    with torch.inference_mode():
        for each in (prepared, make(kind, form)[0].prepare()):
            wanted = each.float()(x)
            state = {name: weight.double() for name, weight in each.state_dict().items()}
            assert each.to("cpu", torch.float64) is each
            assert all(torch.equal(each.state_dict()[name], state[name]) for name in state)
            result = each(x.double() if x.is_floating_point() else x)
            assert tree_leaves(result)[0].dtype == torch.float64
            assert equal(each.float()(x), wanted)


def test_autocast_does_not_change_the_dtype(made):
    _, prepared, x = made
    wanted = prepared(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(prepared(x), wanted)
        if x.is_floating_point():
            rounded = prepared(x.bfloat16())
            assert tree_leaves(rounded)[0].dtype == torch.float32
            assert equal(rounded, prepared(x.bfloat16().float()))


@for_variants
def test_arguments_that_require_gradients_raise_an_error(kind, path):
    prepared, x = kind.layer(6, 20).prepare(), torch.randn(5, 3, 6)
    leaf, reset = x.clone().requires_grad_(), torch.rand(5, 3) < 0.4
    states = kind.states(torch.zeros, 1, 3, 20, requires_grad=True)
    after = kind.states(torch.ones, 5, 1, 3, 20, requires_grad=True)
    calls = [
        lambda: prepared(leaf),
        lambda: prepared(x, states),
        lambda: prepared(x, reset=reset, reset_to=after),
    ]
    if path == "kernel":
        calls.append(lambda: torch.func.grad(lambda x: prepared(x)[0].sum())(x))
        calls.append(lambda: torch.func.jvp(lambda x: prepared(x)[0], (x,), (x,)))
    for call in calls:
        with pytest.raises(RuntimeError, match="call the layer itself"):
            call()
    with torch.no_grad():
        results = prepared(leaf, states, reset=reset, reset_to=after)
    assert not any(result.requires_grad for result in tree_leaves(results))


@for_dtypes
def test_vmap_over_inputs_matches_a_loop(made):
    _, prepared, x = made
    many = torch.stack([x, x.flip(0), x.roll(1, 0)])
    wanted = tree_map(lambda *each: torch.stack(each), *map(prepared, many))
    torch.testing.assert_close(torch.vmap(prepared)(many), wanted)


def error_of(call, *arguments):
    """Returns the type and the text of the error that a call raises."""
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)) as raised:
        call(*arguments)
    return raised.type, str(raised.value)


def test_invalid_arguments_raise_the_same_errors_as_the_layer(kind, made, form):
    module, prepared, x = made
    other_dtype = x.double() if x.is_floating_point() else x.float()
    calls = [(other_dtype,), (x[None, None],), (x, kind.states(torch.zeros, 3, 2, 20))]
    if form != "tokens":
        calls.append((x[..., :1],))
    if form != "step module":
        one = torch.zeros(4, 8, 20)
        calls += [("text",), (x, (None, None)), (x, (one,)), (x, [one, one, one])]
    for arguments in calls:
        assert error_of(prepared, *arguments) == error_of(module, *arguments)
    assert error_of(prepared, x.to("meta"))[0] == error_of(module, x.to("meta"))[0]


@for_dtypes
def test_compiled_programs_use_refreshed_weights(kind, made, form):
    _, prepared, x = made
    torch._dynamo.reset()  # Dynamo limits how often it compiles a forward
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    assert equal(compiled(x), prepared(x))
    prepared.refresh(make(kind, form)[0])
    assert equal(compiled(x), prepared(x))


@for_dtypes
def test_exported_programs_hold_unpacked_weights(made):
    """The program of a layer with 8-bit weights holds the rounded weights in float32."""
    _, prepared, x = made
    frozen = prepared._frozen()
    program = torch.export.export(prepared, (x,), strict=False)
    nodes = {str(node.target) for node in program.graph.nodes}
    assert not any("prepared" in node for node in nodes)
    held = [*program.constants.values(), *program.state_dict.values()]
    for weight in frozen.state_dict().values():
        assert any(weight.shape == other.shape and torch.equal(weight, other) for other in held)
    assert equal(program.module()(x), frozen(x))
    with pytest.raises(Exception, match=r"needs torch.export\(strict=False\)"):
        torch.export.export(prepared, (x,), strict=True)


@pytest.mark.drop_in
def test_traced_and_scripted_prepared_layers_match_the_layer(kind):
    layer, x = kind.layer(6, 20), torch.randn(5, 3, 6)
    prepared = layer.prepare()
    traced = torch.jit.trace(prepared, (x,))
    scripted = torch.jit.script(torch.nn.Sequential(prepared))
    for form in (traced, scripted):
        torch.testing.assert_close(form(x)[0], layer(x)[0])


def operators_in(graph):
    kinds = {node.kind() for node in graph.nodes()}
    return {kind for kind in kinds if not kind.startswith("prim::")}


@for_dtypes
def test_traces_hold_unpacked_weights(kind, made, form):
    """A trace must not hold weights packed for this processor, even if it calls our operator."""
    _, prepared, x = made
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a trace warns about the shapes that it fixes
        traced = torch.jit.trace(prepared, (x,), check_trace=False)
        wanted = prepared._frozen()(x)
        torch.testing.assert_close(traced(x), wanted)
        fused = {"namernn_fast::forward"} if kind.cell.torch is None else set()
        names = operators_in(traced.inlined_graph)
        assert {name for name in names if name.startswith("namernn_fast")} <= fused
        if form != "step module":
            some = torch.jit.trace(
                lambda x: prepared(x, lengths=torch.full((8,), 3)), (x,), check_trace=False
            )
            assert "namernn_fast::unpack" not in operators_in(some.inlined_graph)
            assert torch.equal(some(x)[0], prepared._frozen()(x, lengths=[3] * 8)[0])


@for_dtypes
def test_refreshing_and_loading_pack_into_the_same_memory(kind, made, form, dtype):
    _, prepared, x = made
    tensor = prepared._panels.tensor
    other = make(kind, form)[0].requires_grad_(False)
    prepared.refresh(other)
    assert prepared._panels.tensor is tensor
    assert equal(prepared(x), other.prepare(dtype)(x))
    other = make(kind, form)[0].requires_grad_(False)
    state = {f"rnn.{name}": weight for name, weight in other.state_dict().items()}
    torch.nn.ModuleDict({"rnn": prepared}).load_state_dict(state)
    assert prepared._panels.tensor is tensor
    assert equal(prepared(x), other.prepare(dtype)(x))


def test_refresh_rejects_a_different_layer(kind):
    prepared, x = kind.layer(6, 20).prepare(), torch.randn(5, 3, 6)
    wanted = prepared(x)
    others = [
        kind.layer(6, 21),
        kind.layer(6, 20, batch_first=True),
        kind.layer(6, 20, dtype=torch.float64),
        kind.layer(6, 20, batch_invariant=True),
        kind.layer(6, 20, device="meta"),
        torch.nn.RNN(6, 20),
        kind.step_module(6, 20),
        kind.layer(6, 20).prepare(),
        None,
        *([kind.layer(6, 20, nonlinearity="relu")] if kind.has_nonlinearity else []),
    ]
    for other in others:
        with pytest.raises(ValueError, match="layer must be like the prepared"):
            prepared.refresh(other)
    hooked = kind.layer(6, 20)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="it has hooks"):
        prepared.refresh(hooked)
    assert equal(prepared(x), wanted)


def test_parametrized_layers_are_prepared(kind):
    layer, x = kind.layer(6, 20), torch.randn(5, 3, 6)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    prepared = layer.prepare()
    with torch.no_grad():
        assert equal(prepared(x), layer(x))
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
        prepared.refresh(layer)
        assert equal(prepared(x), layer(x))
    assert type(prepared.restore()) is kind.classes[0]
    assert type(prepare_rnn(torch.nn.Sequential(layer))[0]) is PreparedLayer


def test_global_hooks_do_not_prevent_preparing(made):
    module, prepared, x = made
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert equal(module.prepare()(x), prepared(x))


def test_fx_treats_prepared_modules_as_leaves(made):
    _, prepared, x = made
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(prepared))
    assert equal(graph(x), prepared(x))


def test_prepare_rejects_hooks_and_replaced_forwards(kind):
    hooked = kind.layer(6, 20)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"this {kind.classes[0].__name__}: it has hooks"):
        hooked.prepare()
    other = kind.layer(6, 20)
    other.__class__ = type("Other", (type(other),), {"forward": lambda self, x: x})
    with pytest.raises(RuntimeError, match="the class Other has a different forward"):
        other.prepare()
    model = kind.tokens(9, 6, 20)
    model.embedding.max_norm = 1.0
    with pytest.raises(RuntimeError, match="the embedding has one of the options max_norm"):
        model.prepare()


def test_a_prepared_module_runs_its_own_hooks(kind):
    prepared, calls = kind.layer(6, 20).prepare(), []
    prepared.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(5, 3, 6)
    last = prepared(x)[1]
    assert equal(prepared.last_state(x), last)
    assert len(calls) == 2


def dumps_and_loads(model):
    return pickle.loads(pickle.dumps(model))


class Model(torch.nn.Module):
    """A model with every kind of recurrent module. One module occurs twice."""

    def __init__(self, kind):
        super().__init__()
        self.first = kind.layer(6, 20)
        self.list = torch.nn.ModuleList([self.first, kind.nn_layer(6, 20), torch.nn.Linear(2, 2)])
        self.tokens = kind.tokens(9, 6, 20)
        self.step = kind.step_module(6, 20)
        self.nothing = None
        self.subclass = type("Mine", (kind.layer,), {})(6, 20)


@pytest.mark.drop_in
def test_prepare_rnn_replaces_recurrent_modules(kind):
    model = Model(kind)
    tokens, state = model.tokens, {k: v.clone() for k, v in model.state_dict().items()}
    assert prepare_rnn(model) is model
    assert model.first is model.list[0]
    assert all(type(m) is PreparedLayer for m in (*model.list[:2], model.tokens))
    assert type(model.step) is PreparedCell
    assert type(model.subclass).__name__ == "Mine"
    assert type(tokens.rnn) is kind.layer
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    prepare_rnn(model)
    assert restore_rnn(model) is model
    assert model.first is model.list[0]
    assert type(model.first) is type(model.list[1]) is kind.layer
    assert (type(model.tokens), type(model.step)) == (kind.tokens, kind.step_module)
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


class Tied(torch.nn.Module):
    """A model in which modules share parameters."""

    def __init__(self, kind):
        super().__init__()
        self.tokens = kind.tokens(9, 6, 20)
        self.decoder = torch.nn.Linear(6, 9)
        self.decoder.weight = self.tokens.embedding.weight
        self.first, self.second = kind.layer(20, 20, 2), kind.layer(20, 20)
        for layer in (self.first, self.second):
            layer.weight_hh_l0 = self.tokens.rnn.weight_hh_l0
        self.first.weight_ih_l1 = self.first.weight_ih_l0

    def ties(self):
        """Returns the names of each parameter as a set. A shared parameter has several names."""
        names = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
        return {frozenset(each) for each in names.values()}


@pytest.mark.parametrize("change", [lambda model: model, copy.deepcopy, dumps_and_loads])
def test_restore_rnn_restores_tied_parameters(kind, change):
    model = Tied(kind)
    wanted, state = model.ties(), {k: v.clone() for k, v in model.state_dict().items()}
    assert len(wanted) < len(state)
    restored = restore_rnn(change(prepare_rnn(model)))
    assert restored.ties() == wanted
    assert all(torch.equal(w, state[name]) for name, w in restored.state_dict().items())
    assert restored.first._flat_weights[1] is restored.tokens.rnn.weight_hh_l0
    prepare_rnn(restored)
    restored.second.refresh(kind.layer(20, 20))
    with torch.no_grad():
        restored.decoder.weight.add_(1)
    restore_rnn(restored)
    assert restored.decoder.weight is not restored.tokens.embedding.weight
    torch.testing.assert_close(restored.tokens.embedding.weight + 1, restored.decoder.weight)
    assert restored.second.weight_hh_l0 is not restored.first.weight_hh_l0
    assert restored.first.weight_hh_l0 is restored.tokens.rnn.weight_hh_l0
    prepare_rnn(model := Tied(kind))
    model.decoder.double()  # equal values of another dtype
    dtypes = {name: weight.dtype for name, weight in restore_rnn(model).state_dict().items()}
    assert dtypes.pop("decoder.weight") == dtypes.pop("decoder.bias") == torch.float64
    assert {*dtypes.values()} == {torch.float32}


@pytest.mark.drop_in
def test_prepare_rnn_accepts_a_single_layer(kind):
    """Tests torch's layer, and a fused layer that `replace_rnn` returned."""
    layer, x = kind.nn_layer(6, 20), torch.randn(5, 8, 6)
    wanted, prepared = layer(x)[0], prepare_rnn(layer)
    assert type(layer) is kind.nn_layer
    for each in (prepared, prepare_rnn(replace_rnn(layer))):
        assert type(each) is PreparedLayer
        torch.testing.assert_close(each(x)[0], wanted)
        assert type(restore_rnn(each)) is kind.layer


@pytest.mark.drop_in
def test_the_error_of_prepare_rnn_names_the_module_with_hooks(kind):
    model = Model(kind)
    model.list[1].register_forward_pre_hook(lambda *_: None)
    name = kind.nn_layer.__name__
    with pytest.raises(RuntimeError, match=rf"cannot replace 'list.1', a {name}: it has hooks"):
        prepare_rnn(model)
    assert type(model.first) is kind.layer
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        prepare_rnn(7)
    with pytest.warns(UserWarning, match="prepare_rnn replaced nothing: the Linear has no"):
        prepare_rnn(torch.nn.Linear(2, 2))


def test_prepare_copies_batch_invariance_from_the_layer(kind):
    x = torch.randn(8, 1, 64)
    many = x.expand(8, 16, 64)
    prepared = kind.layer(64, 64, batch_invariant=True).prepare()
    assert prepared.batch_invariant
    assert torch.equal(prepared(x)[0], prepared(many)[0][:, :1])
    layer = kind.layer(64, 64)
    with batch_invariant():
        plain = layer.prepare()
        assert torch.equal(plain(x)[0], plain(many)[0][:, :1])
    assert plain._panels.options == layer.prepare()._panels.options != prepared._panels.options


@for_dtypes
def test_batch_invariance_can_be_set(kind, made, form, dtype):
    module, prepared, _ = made
    if form == "step module":
        with pytest.raises(AttributeError, match="only batch_invariant of a prepared layer"):
            prepared.batch_invariant = True
        return
    stream = kind.layer(6, 20).prepare(dtype).stream(2)
    for each in (prepared, stream._prepared):
        each.batch_invariant = True
        assert each.batch_invariant
        assert each._panels.call_options() & ops.BATCH_INVARIANT
        assert not each._panels.has_table
        with pytest.raises(AttributeError, match=r"got batch_first: prepare another \w+"):
            each.batch_first = False
    with torch.no_grad(), pytest.raises(RuntimeError, match="make a new stream"):
        stream(torch.randn(2, 6))
    ids_or_rows = make(kind, form)[1]
    getattr(module, "rnn", module).batch_invariant = True
    assert equal(prepared(ids_or_rows), module.prepare(dtype)(ids_or_rows))
    assert copy.deepcopy(prepared).batch_invariant
    if dtype is None:  # with 8-bit weights, weight_ih was rounded when its table was dropped
        prepared.batch_invariant = getattr(module, "rnn", module).batch_invariant = False
        assert equal(prepared(ids_or_rows), module.prepare(dtype)(ids_or_rows))


def test_prefixes_are_shared_only_with_a_table(kind, monkeypatch):
    monkeypatch.setattr(prepared_module, "MOST_TABLE_BYTES", 0)
    prepared, ids = kind.tokens(9, 6, 40).prepare(), torch.randint(9, (8, 5))
    with pytest.raises(ValueError, match="impossible here: the layer was prepared without a table"):
        prepared.last_state(ids, share_prefixes=True)


@for_variants
def test_explain_names_packed_weights(made, form):
    _, prepared, x = made
    explanation = explain(prepared, x)
    assert explanation.path.startswith("cpu")
    assert explanation.shortcuts[0] == "prepared weights"
    assert ("table" in explanation.shortcuts) == (form == "tokens")


PICKLE = """
import pickle, sys, torch, namernn_fast
torch.manual_seed(0)
with open(sys.argv[1] + ".layer", "rb") as file:
    layer = pickle.load(file)
prepared, x = layer.prepare(eval(sys.argv[2])), torch.randn(5, 3, 6)
program = torch.export.export(prepared, (x,))
torch.export.save(program, sys.argv[1] + ".pt2")
with open(sys.argv[1], "wb") as file:
    pickle.dump((prepared, x, prepared(x)[0]), file)
"""


@pytest.mark.slow
@for_dtypes
def test_saved_files_work_on_other_instruction_sets(kind, dtype, tmp_path, run_program):
    """8-bit results differ slightly: kernels round states, but exported programs do not."""
    path, options = tmp_path / "prepared", {"cwd": tmp_path, "ATEN_CPU_CAPABILITY": "default"}
    layer = kind.layer(6, 20, 2, bidirectional=True)
    path.with_suffix(".layer").write_bytes(pickle.dumps(layer))
    run_program("-c", PICKLE, path, dtype, **options)
    prepared, x, wanted = pickle.loads(path.read_bytes())
    assert prepared.dtype == dtype
    tolerance = {} if dtype is None else {"atol": 0.01, "rtol": 0}
    torch.testing.assert_close(prepared(x)[0], wanted, **tolerance)
    program = torch.export.load(f"{path}.pt2").module()
    torch.testing.assert_close(program(x)[0], wanted, **tolerance)


@for_variants
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_prepared_modules_equal_to_layers(kind, form, seed, fused_steps):
    """Results match the layer after refreshes, copies, loads and conversions in any order."""
    generator = torch.Generator().manual_seed(seed)
    module, x = make(kind, form)
    module.requires_grad_(False)
    prepared = module.prepare()
    for _ in range(60):
        match int(torch.randint(7, (), generator=generator)):
            case 0:
                module = make(kind, form)[0].to(next(module.parameters()).dtype)
                prepared.refresh(module.requires_grad_(False))
            case 1:
                prepared = copy.deepcopy(prepared)
            case 2:
                prepared = pickle.loads(pickle.dumps(prepared))
            case 3:
                state = make(kind, form)[0].state_dict()
                module.load_state_dict(state)
                prepared.load_state_dict(state)
            case 4:
                dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
                dtype = dtypes[int(torch.randint(4, (), generator=generator))]
                module, prepared = module.to(dtype), prepared.to(dtype)
            case 5:
                prepared = prepared.restore().requires_grad_(False).prepare()
            case 6:
                state = prepared.state_dict()
                assert all(torch.equal(w, state[name]) for name, w in module.state_dict().items())
        y = x.to(next(module.parameters()).dtype) if x.is_floating_point() else x
        assert equal(prepared(y), module(y))
