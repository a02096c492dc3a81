"""Tests `TokenRNN`, `TokenGRU` and `TokenLSTM`, which combine an embedding and a layer."""

import copy

import pytest
import torch
from kinds import for_variants, map_states, tensors_in
from layouts import gradients
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

from namernn_fast import batch_invariant, explain, ops, replace_rnn, restore_rnn
from namernn_fast.machine import availability

V, D, H, T, B = 6, 4, 5, 7, 3
IDS = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model(kind, **options):
    return kind.tokens(V, D, H, dtype=torch.float64, **options)


def run_parts(model, ids, *arguments, **more):
    """Calls a model's embedding and then its layer, and returns the results."""
    return model.rnn(model.embedding(ids), *arguments, **more)


def check(model, ids=IDS, *arguments, twin=None, **more):
    """Checks that the model matches separate calls of its embedding and layer, or of `twin`'s."""
    got = model(ids, *arguments, **more)
    wanted = run_parts(twin or model, ids, *arguments, **more)
    torch.testing.assert_close(got, wanted, **EXACT)
    parameters = ([*module.parameters()] for module in (model, twin or model))
    torch.testing.assert_close(*map(gradients, (got, wanted), parameters), **EXACT)
    with torch.no_grad():
        state = model.last_state(ids, *arguments, **more)
    torch.testing.assert_close(state, wanted[1], **EXACT)


def stacked(results):
    """Stacks the results of several calls."""
    return tree_map(lambda *each: torch.stack(each), *results)


@for_variants
@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_model_equals_its_layer_on_embedded_ids(kind, padding_idx, bidirectional):
    ours = model(
        kind, num_layers=2, bidirectional=bidirectional, batch_first=True, padding_idx=padding_idx
    )
    ids = IDS.T.contiguous()
    check(ours, ids)
    hx = kind.states(torch.randn, 4 if bidirectional else 2, B, H, dtype=torch.float64)
    check(ours, ids, hx)
    check(ours, ids, lengths=[T, 0, 3])
    check(ours, ids, reset=torch.rand(B, T) < 0.3)


@pytest.mark.parametrize("fused", [True, False])
def test_packed_and_jagged_ids_match_embedded_rows(kind, fused):
    ours = model(kind, num_layers=2)
    ours.embedding.scale_grad_by_freq = not fused
    assert (ours.why_not_fused() is None) == fused
    packed = pack_sequence([IDS[:3, 0], IDS[:, 1], IDS[:1, 2]], enforce_sorted=False)
    output, last = ours(packed)
    wanted, states = ours.rnn(packed._replace(data=ours.embedding(packed.data)))
    torch.testing.assert_close((output.data, last), (wanted.data, states), **EXACT)
    torch.testing.assert_close(ours.last_state(packed), states, **EXACT)
    jagged = torch.nested.nested_tensor([IDS[:3, 0], IDS[:, 1]], layout=torch.jagged)
    states = map_states(states, lambda state: state[:, :2])
    torch.testing.assert_close(ours(jagged)[1], states, **EXACT)
    torch.testing.assert_close(ours.last_state(jagged), states, **EXACT)


def test_parameters_match_a_separate_embedding_and_layer(kind):
    torch.manual_seed(5)
    parts = nn.ModuleDict({"embedding": nn.Embedding(V, D, padding_idx=1)})
    parts["rnn"] = kind.layer(D, H, 2, bias=False)
    torch.manual_seed(5)
    ours, wanted = kind.tokens(V, D, H, 2, bias=False, padding_idx=1), parts.state_dict()
    assert list(ours.state_dict()) == list(wanted)
    torch.testing.assert_close(ours.state_dict(), wanted, rtol=0, atol=0)


def test_constructor_passes_options_to_the_embedding_and_the_layer(kind):
    nonlinearity = ("relu",) if kind.has_nonlinearity else ()
    ours = kind.tokens(V, D, H, 3, *nonlinearity, False, True, 0.5, True, dtype=torch.bfloat16)
    assert (ours.rnn.num_layers, ours.rnn.bias) == (3, False)
    assert ours.rnn._nonlinearity() == ("relu" if kind.has_nonlinearity else "tanh")
    assert (ours.rnn.batch_first, ours.rnn.dropout, ours.rnn.bidirectional) == (True, 0.5, True)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert kind.tokens(V, D, H, batch_invariant=True).rnn.batch_invariant
    with torch.device("meta"):
        assert kind.tokens(V, D, H)(torch.zeros(T, B, dtype=torch.int64))[0].shape == (T, B, H)


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_embedding_options_bypass_the_table(kind, option):
    """The module calls the embedding if it has an option that a table would ignore."""
    ours = model(kind)
    setattr(ours.embedding, option, 0.5 if option == "max_norm" else True)
    assert "max_norm, scale_grad_by_freq and sparse" in ours.why_not_fused()
    check(ours, twin=copy.deepcopy(ours))


def test_custom_embedding_class_is_called(kind):
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    ours = model(kind)
    ours.embedding = Doubled(V, D, dtype=torch.float64)
    check(ours)
    with pytest.raises(ValueError, match="is impossible here: the embedding is of the class Doub"):
        ours.last_state(IDS, share_prefixes=True)


def test_a_replaced_forward_of_the_layer_gets_embedded_rows(kind):
    """A `forward` that replaces the layer's own may not accept token ids."""
    ours = model(kind)
    ours.rnn.forward = lambda rows, hx=None: (rows, hx)
    assert torch.equal(ours(IDS)[0], ours.embedding(IDS))


def test_last_state_refuses_a_subclass_with_another_forward(kind):
    """`last_state` would not run that `forward`, unless the subclass has its own `last_state`."""
    ours = model(kind)

    def subclass(module, **methods):
        module.__class__ = type("Mine", (type(module),), methods)

    def forward(self, *arguments, **keywords):
        return super(type(self), self).forward(*arguments, **keywords)

    rows, message = ours.embedding(IDS), "last_state would not run the forward of Mine"
    subclass(ours.rnn)
    ours.rnn.last_state(rows)
    for module, of_call in ((ours, IDS), (ours.rnn, rows)):
        subclass(module, forward=forward)
        with pytest.raises(RuntimeError, match=message):
            module.last_state(of_call)
        with pytest.raises(RuntimeError, match=message):
            explain(module, of_call, last_state=True)
        subclass(module, last_state=lambda self, *arguments: "mine")
        assert module.last_state(of_call) == "mine"


def test_last_state_passes_only_given_arguments_to_a_replaced_forward(kind):
    """A `forward` that replaces the original may not have newer arguments such as `reset_to`."""
    ours = model(kind)

    def forward(x, hx=None, lengths=None, *rest, reset=None, embedding=None, padding_idx=None):
        return "rs"

    ours.rnn.forward = forward
    assert ours.rnn.last_state(ours.embedding(IDS)) == "s"
    ours.forward = lambda ids, hx=None, lengths=None, reset=None: "rs"
    assert ours.last_state(IDS) == "s"


def test_a_backward_hook_of_the_embedding_runs(kind):
    ours, calls = model(kind), []
    ours.embedding.register_full_backward_hook(lambda *arguments: calls.append(arguments))
    ours(IDS)[0].sum().backward()
    assert len(calls) == 1


def double_all(module, inputs, results):
    return tree_map(lambda result: 2 * result, results)


def double_forward(module):
    """Doubles a module's results by replacing `forward` on the instance, as accelerate does."""
    run = module.forward
    module.forward = lambda *args, **kwargs: double_all(module, args, run(*args, **kwargs))


@pytest.mark.parametrize("part", ["", "embedding", "rnn"])
@pytest.mark.parametrize("how", ["forward", "hook", "global hook"])
def test_hooks_and_replaced_forwards_run(kind, how, part, request):
    """`forward` and `last_state` run the hooks and replaced `forward` methods of each part."""
    ours = model(kind)
    twin = nn.ModuleDict(
        {"embedding": copy.deepcopy(ours.embedding), "rnn": kind.nn_layer(D, H).double()}
    )
    twin.rnn.load_state_dict(ours.rnn.state_dict())
    twin.forward = lambda ids: twin.rnn(twin.embedding(ids))
    chosen = [module.get_submodule(part) for module in (ours, twin)]
    if how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *rest: double_all(module, *rest) if module in chosen else None
        )
        request.addfinalizer(handle.remove)
    for module in chosen:
        if how == "forward":
            double_forward(module)
        elif how == "hook":
            module.register_forward_hook(double_all)
    _, wanted = twin(IDS)
    torch.testing.assert_close(ours(IDS)[1], wanted)
    torch.testing.assert_close(ours.last_state(IDS), wanted)
    with pytest.raises(ValueError, match=f"has .*{how.split()[-1]}"):
        ours.last_state(IDS, share_prefixes=True)


@pytest.mark.parametrize("whole", [True, False], ids=["tokens", "layer"])
def test_last_state_recomputes_pruned_weights(kind, whole):
    """Pruning recomputes a weight in a forward pre-hook, so `last_state` must run such hooks."""
    ours = model(kind)
    prune.random_unstructured(ours.rnn, "weight_hh_l0", 0.5)
    pruned = {name: value * 2 for name, value in ours.state_dict().items()}
    ours.load_state_dict(pruned)
    rows = ours.embedding.weight.detach()[IDS]
    run = (lambda: ours.last_state(IDS)) if whole else (lambda: ours.rnn.last_state(rows))
    for _ in range(2):  # training steps
        last = run()
        torch.testing.assert_close(last, ours.rnn(rows)[1])
        tensors_in(last)[0].sum().backward()
        with torch.no_grad():
            ours.rnn.weight_hh_l0_orig.mul_(1.5)


def test_parametrized_weights_take_the_fused_path(kind):
    ours = model(kind)
    nn.utils.parametrizations.weight_norm(ours.embedding, "weight")
    nn.utils.parametrizations.weight_norm(ours.rnn, "weight_hh_l0")
    assert ours.why_not_fused() is None
    check(ours)


@pytest.mark.drop_in
def test_token_model_accepts_torchs_layer(kind):
    """A model with torch's own layer instead of a fused layer runs, but rejects lengths=."""
    ours = model(kind, num_layers=2)
    wanted = ours(IDS)
    assert type(restore_rnn(ours).rnn) is kind.nn_layer
    torch.testing.assert_close(ours(IDS), wanted)
    torch.testing.assert_close(ours.last_state(IDS), wanted[1])
    with pytest.raises(TypeError, match="lengths"):
        ours(IDS, lengths=[1, 2, 3])
    assert type(replace_rnn(ours).rnn) is kind.layer
    assert ours.why_not_fused() is None
    torch.testing.assert_close(ours(IDS), wanted)


@pytest.mark.parametrize("in_dims", [1, 2])
def test_vmap_over_ids_matches_a_loop(kind, in_dims):
    ours = model(kind, num_layers=2, bidirectional=True, padding_idx=0)
    ids = torch.randint(V, (T, B, B))
    wanted = stacked([ours(sample) for sample in ids.unbind(in_dims)])
    got = vmap(ours, in_dims)(ids)
    torch.testing.assert_close(got, wanted, **EXACT)
    leaves = [*ours.parameters()]
    torch.testing.assert_close(gradients(got, leaves), gradients(wanted, leaves), **EXACT)
    state = vmap(ours.last_state, in_dims)(ids)
    torch.testing.assert_close(state, wanted[1], **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(vmap(ours.last_state, in_dims)(ids), wanted[1], **EXACT)
    nested = vmap(vmap(ours.last_state, 1), 0, 1)(ids.unsqueeze(0))
    nested = map_states(nested, lambda state: state.squeeze(1))
    torch.testing.assert_close(nested, stacked([ours(i)[1] for i in ids.unbind(1)]))


def test_vmap_over_lengths_matches_a_loop(kind):
    ours = model(kind, num_layers=2)
    lengths = torch.randint(T + 1, (4, B))
    garbage = IDS.masked_fill(torch.arange(T)[:, None] >= lengths.amax(0), -9)

    def run(lengths):
        return ours(garbage, lengths=lengths)

    torch.testing.assert_close(vmap(run)(lengths), stacked(map(run, lengths)))


class Methods(nn.Module):
    """A wrapper whose `forward` calls a chosen method of its module."""

    def __init__(self, module, method="last_state"):
        super().__init__()
        self.m, self.method = module, method

    def forward(self, ids):
        return getattr(self.m, self.method)(ids)


def called(module, method, parameters, ids):
    """Calls a module's method with the given parameters, and returns the results as a flat list."""
    named = {f"m.{name}": parameter for name, parameter in parameters.items()}
    return tree_leaves(functional_call(Methods(module, method), named, (ids,)))


@pytest.mark.parametrize("method", ["forward", "last_state"])
def test_vmap_over_models_matches_a_loop(kind, method):
    models = [model(kind, num_layers=2) for _ in range(4)]
    parameters, _ = torch.func.stack_module_state(models)
    wanted = stacked([called(m, method, dict(m.named_parameters()), IDS) for m in models])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            got = vmap(lambda p: called(models[0], method, p, IDS))(parameters)
        torch.testing.assert_close(got, wanted, **EXACT)


def test_vmap_rejects_an_id_out_of_range(kind):
    """The error does not say where the id is, because vmap merges all ids into one batch."""
    ids = IDS.repeat(2, 1, 1)
    ids[1, 2, 2] = V
    with pytest.raises(IndexError, match=r"ids from 0 to 5 \(the rows of embedding\)"):
        vmap(model(kind))(ids)
    ours = model(kind)
    vmap(lambda sample: ours(sample, lengths=torch.tensor([T, T, 2])))(ids)


@pytest.mark.parametrize("method", ["forward", "last_state"])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_per_sample_gradients_of_token_layers_match_a_loop(kind, method, padding_idx):
    ours = model(kind, num_layers=2, bidirectional=True, padding_idx=padding_idx)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, ids):
        return sum(result.square().sum() for result in called(ours, method, parameters, ids))

    ids = torch.randint(V, (4, T, B))
    got = vmap(grad(loss), (None, 0))(parameters, ids)
    for k, sample in enumerate(ids):
        ours.zero_grad()
        loss(dict(ours.named_parameters()), sample).backward()
        for name, p in ours.named_parameters():
            torch.testing.assert_close(got[name][k], p.grad, **EXACT)


def test_explain_lists_shortcuts_for_token_ids(kind):
    kernel = f"cpu {ops.cpu_kernel()}" if availability.HAS_EXTENSION else kind.without_kernel
    ours, ids = kind.tokens(9, D, 64), torch.randint(9, (5, 200))
    explained = explain(ours, ids)
    needed = "the output is needed"
    assert explained.path == kernel
    assert explained.shortcuts == ("table",)
    assert explained.why_no_shortcut == {"last state": needed, "shared prefixes": needed}
    with torch.no_grad():
        explained = explain(ours, ids, last_state=True)
        assert explained.shortcuts == ("table", "last state", "shared prefixes")
        assert not explained.why_no_shortcut
        assert str(explained).startswith(f"{kernel} with table, last state, shared prefixes (")
        with batch_invariant():
            assert explain(ours, ids, last_state=True).shortcuts == ("last state",)
    explained = explain(ours, pack_sequence([*ids.T]), last_state=True)
    assert explained.shortcuts == ("table", "shared prefixes")
    assert explained.why_no_shortcut == {"last state": "the backward pass reads the output"}
    assert "not last state: the backward pass reads the output" in str(explained)
    with torch.autocast("cpu", torch.bfloat16):
        explained = explain(ours, ids, last_state=True)
        if kind.autocasts_only_products:
            assert explained.path == kernel
            assert "shared prefixes" in explained.shortcuts
        else:
            assert explained.path == f"cpu {ops.cpu_kernel(torch.bfloat16)}"
            assert "not in torch.bfloat16" in explained.why_no_shortcut["shared prefixes"]
    dropped, hooked = kind.tokens(9, D, 64, 2, dropout=0.5), kind.tokens(9, D, 64)
    hooked.embedding.register_forward_hook(lambda *arguments: None)
    hx = kind.states(torch.zeros, 1, 200, 64)
    for layer, input, more, name, reason in (
        (ours, ids[:, :1], {}, "table", "multiplying 5 ids is less work than multiplying 9 rows"),
        (ours, ids[:, :1], {}, "shared prefixes", "for at least 128 sequences, not for 1"),
        (ours, ids, {"hx": hx}, "shared prefixes", "its own initial state"),
        (ours, ids, {"reset": ids > 9}, "shared prefixes", "reset restarts sequences"),
        (dropped, ids, {}, "last state", "dropout needs the output of each layer"),
        (hooked, ids, {}, "table", "the embedding has hooks"),
    ):
        explained = explain(layer, input, last_state=True, **more)
        assert explained.why_no_shortcut[name].endswith(reason)


def test_explain_distinguishes_ids_from_rows(kind):
    layer, embedding, ids = kind.layer(D, 64), torch.randn(9, D), torch.randint(9, (5, 200))
    assert explain(layer, ids, embedding=embedding).shortcuts == ("table",)
    rows = embedding[ids]
    explained = explain(layer, rows)
    assert not explained.shortcuts
    assert not explained.why_no_shortcut
    explained = explain(layer.requires_grad_(False), rows, last_state=True)
    assert explained.shortcuts == ("last state",)
    assert explained.why_no_shortcut["table"] == "input does not hold token ids"
    with pytest.raises(TypeError, match="int32 or int64, if embedding is given, got"):
        explain(layer, rows, embedding=embedding)


def test_explain_names_missing_shortcuts_without_a_kernel(kind, monkeypatch):
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    explained = explain(kind.tokens(9, D, 64), torch.randint(9, (5, 200)), last_state=True)
    assert explained.path == kind.without_kernel
    missing = {"shared prefixes": "the C++ extension was not built"}
    if kind.without_kernel == "reference":
        missing["last state"] = "PyTorch's operators, step by step, compute every state"
        assert explained.shortcuts == ("table",)
    else:
        missing["last state"] = "torch's own operator returns every state"
        missing["table"] = "torch's own operator takes rows of features"
        assert explained.shortcuts == ()
    assert explained.why_no_shortcut == missing


@pytest.mark.drop_in
def test_traced_last_state_accepts_other_sizes(kind):
    ours = model(kind)
    program = torch.jit.trace(Methods(ours), IDS)
    ids = torch.randint(V, (T + 2, B + 1))
    torch.testing.assert_close(program(ids), ours(ids)[1], **EXACT)


def test_quantized_embedding_is_called(kind):
    """If a tool replaces the embedding module, the token layer calls the replacement."""
    ours = kind.tokens(V, D, H)
    embedding = copy.deepcopy(ours.embedding)
    embedding.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    ours.embedding = torch.ao.nn.quantized.Embedding.from_float(embedding)
    torch.testing.assert_close(ours(IDS), ours.rnn(ours.embedding(IDS)))
