"""`TokenRNN`, `TokenGRU`, `TokenLSTM`: an embedding and a layer as one module."""

import copy

import pytest
import torch
from kinds import map_states, tensors_in
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

from namernn_fast import (
    availability,
    batch_invariant,
    explain,
    ops,
    replace_rnn,
    restore_rnn,
)

V, D, H, T, B = 6, 4, 5, 7, 3
IDS = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def model(kind, **options):
    return kind.tokens(V, D, H, dtype=torch.float64, **options)


def of_parts(model, ids, *arguments, **more):
    """Returns the results of the embedding followed by the layer."""
    return model.rnn(model.embedding(ids), *arguments, **more)


def gradients(results, model):
    """Returns the gradient of each parameter for a randomly weighted sum of the results."""
    generator = torch.Generator().manual_seed(1)
    results = tree_leaves(results)
    weights = [torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in results]
    return torch.autograd.grad(results, [*model.parameters()], weights, allow_unused=True)


def check(model, ids=IDS, *arguments, twin=None, **more):
    """Checks a model against its parts, or against those of a twin: results and gradients."""
    got = model(ids, *arguments, **more)
    wanted = of_parts(twin or model, ids, *arguments, **more)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(gradients(got, model), gradients(wanted, twin or model), **EXACT)
    with torch.no_grad():
        state = model.last_state(ids, *arguments, **more)
    torch.testing.assert_close(state, wanted[1], **EXACT)


def stacked(results):
    """Stacks the results of several calls."""
    return tree_map(lambda *each: torch.stack(each), *results)


@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_it_is_the_layer_on_the_embedding(kind, padding_idx, bidirectional):
    own = model(
        kind, num_layers=2, bidirectional=bidirectional, batch_first=True, padding_idx=padding_idx
    )
    ids = IDS.T.contiguous()
    check(own, ids)
    hx = kind.states(torch.randn, 4 if bidirectional else 2, B, H, dtype=torch.float64)
    check(own, ids, hx)
    check(own, ids, lengths=[T, 0, 3])
    check(own, ids, reset=torch.rand(B, T) < 0.3)


@pytest.mark.parametrize("fused", [True, False])
def test_packed_and_jagged(kind, fused):
    own = model(kind, num_layers=2)
    own.embedding.scale_grad_by_freq = not fused
    assert (own.why_not_fused() is None) == fused
    packed = pack_sequence([IDS[:3, 0], IDS[:, 1], IDS[:1, 2]], enforce_sorted=False)
    output, last = own(packed)
    wanted, states = own.rnn(packed._replace(data=own.embedding(packed.data)))
    torch.testing.assert_close((output.data, last), (wanted.data, states), **EXACT)
    torch.testing.assert_close(own.last_state(packed), states, **EXACT)
    jagged = torch.nested.nested_tensor([IDS[:3, 0], IDS[:, 1]], layout=torch.jagged)
    states = map_states(states, lambda state: state[:, :2])
    torch.testing.assert_close(own(jagged)[1], states, **EXACT)
    torch.testing.assert_close(own.last_state(jagged), states, **EXACT)


def test_parameters_are_those_of_the_parts(kind):
    torch.manual_seed(5)
    parts = {
        "embedding": nn.Embedding(V, D, padding_idx=1),
        "rnn": kind.nn_layer(D, H, 2, bias=False),
    }
    torch.manual_seed(5)
    own = kind.tokens(V, D, H, 2, bias=False, padding_idx=1)
    wanted = nn.ModuleDict(parts).state_dict()
    assert list(own.state_dict()) == list(wanted)
    torch.testing.assert_close(own.state_dict(), wanted, rtol=0, atol=0)


def test_options_reach_both_parts(kind):
    nonlinearity = ("relu",) if kind.has_nonlinearity else ()
    own = kind.tokens(V, D, H, 3, *nonlinearity, False, True, 0.5, True, dtype=torch.bfloat16)
    mode = "RNN_RELU" if kind.has_nonlinearity else kind.name.upper()
    assert (own.rnn.num_layers, own.rnn.mode, own.rnn.bias) == (3, mode, False)
    assert (own.rnn.batch_first, own.rnn.dropout, own.rnn.bidirectional) == (True, 0.5, True)
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16}
    assert kind.tokens(V, D, H, batch_invariant=True).rnn.batch_invariant
    with torch.device("meta"):
        assert kind.tokens(V, D, H)(torch.zeros(T, B, dtype=torch.int64))[0].shape == (T, B, H)


def test_training_moves_both_parts(kind):
    """Optimizer steps equal those of the separate parts, up to rounding in float64."""
    own = model(kind, num_layers=2, padding_idx=2)
    twin = copy.deepcopy(own)
    for module, run in ((own, own.last_state), (twin, lambda ids: of_parts(twin, ids)[1])):
        optimizer = torch.optim.Adam(module.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            sum(state.square().sum() for state in tensors_in(run(IDS))).backward()
            optimizer.step()
    for mine, other in zip(own.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_an_embedding_that_does_more(kind, option):
    """The token table would ignore these options, so the module calls the embedding."""
    own = model(kind)
    setattr(own.embedding, option, 0.5 if option == "max_norm" else True)
    assert "max_norm, scale_grad_by_freq and sparse" in own.why_not_fused()
    check(own, twin=copy.deepcopy(own))


def test_an_embedding_of_another_class(kind):
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    own = model(kind)
    own.embedding = Doubled(V, D, dtype=torch.float64)
    check(own)
    with pytest.raises(ValueError, match="is impossible here: the embedding is of the class Doub"):
        own.last_state(IDS, share_prefixes=True)


def test_a_forward_set_on_the_layer_gets_rows(kind):
    """A `forward` set on the layer may not accept token ids, so it gets embedded rows."""
    own = model(kind)
    own.rnn.forward = lambda rows, hx=None: (rows, hx)
    assert torch.equal(own(IDS)[0], own.embedding(IDS))


def test_a_backward_hook_of_the_embedding_runs(kind):
    own, calls = model(kind), []
    own.embedding.register_full_backward_hook(lambda *arguments: calls.append(arguments))
    own(IDS)[0].sum().backward()
    assert len(calls) == 1


def double_all(module, inputs, results):
    return tree_map(lambda result: 2 * result, results)


def double_forward(module):
    """Replaces `forward` on the instance, as accelerate does."""
    run = module.forward
    module.forward = lambda *args, **kwargs: double_all(module, args, run(*args, **kwargs))


@pytest.mark.parametrize("part", ["", "embedding", "rnn"])
@pytest.mark.parametrize("how", ["forward", "hook", "global hook"])
def test_what_a_call_runs_besides_forward(kind, how, part, request):
    """Replaced forwards and hooks run in each part, and in `last_state` of the whole."""
    own = model(kind)
    twin = nn.ModuleDict(
        {"embedding": copy.deepcopy(own.embedding), "rnn": kind.nn_layer(D, H).double()}
    )
    twin.rnn.load_state_dict(own.rnn.state_dict())
    twin.forward = lambda ids: twin.rnn(twin.embedding(ids))
    chosen = [module.get_submodule(part) for module in (own, twin)]
    if how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *rest: (
                double_all(module, *rest) if any(module is m for m in chosen) else None
            )
        )
        request.addfinalizer(handle.remove)
    for module in chosen:
        if how == "forward":
            double_forward(module)
        elif how == "hook":
            module.register_forward_hook(double_all)
    _, wanted = twin(IDS)
    torch.testing.assert_close(own(IDS)[1], wanted)
    torch.testing.assert_close(own.last_state(IDS), wanted)
    with pytest.raises(ValueError, match=f"has .*{how.split()[-1]}"):
        own.last_state(IDS, share_prefixes=True)


@pytest.mark.parametrize("whole", [True, False], ids=["tokens", "layer"])
def test_last_state_of_pruned_weights(kind, whole):
    """Pruning recomputes the weight in a forward pre-hook at each call."""
    own = model(kind)
    prune.random_unstructured(own.rnn, "weight_hh_l0", 0.5)
    pruned = {name: value * 2 for name, value in own.state_dict().items()}
    own.load_state_dict(pruned)
    rows = own.embedding.weight.detach()[IDS]
    run = (lambda: own.last_state(IDS)) if whole else (lambda: own.rnn.last_state(rows))
    for _ in range(2):  # training steps
        last = run()
        torch.testing.assert_close(last, own.rnn(rows)[1])
        tensors_in(last)[0].sum().backward()
        with torch.no_grad():
            own.rnn.weight_hh_l0_orig.mul_(1.5)


def test_parametrizations(kind):
    own = model(kind)
    nn.utils.parametrizations.weight_norm(own.embedding, "weight")
    nn.utils.parametrizations.weight_norm(own.rnn, "weight_hh_l0")
    assert own.why_not_fused() is None
    check(own)


def test_replacing_and_restoring(kind):
    """With torch's own layer inside, a model still runs, but lengths are an error."""
    own = model(kind, num_layers=2)
    wanted = own(IDS)
    assert type(restore_rnn(own).rnn) is kind.nn_layer
    torch.testing.assert_close(own(IDS), wanted)
    torch.testing.assert_close(own.last_state(IDS), wanted[1])
    with pytest.raises(TypeError, match="lengths"):
        own(IDS, lengths=[1, 2, 3])
    assert type(replace_rnn(own).rnn) is kind.layer
    assert own.why_not_fused() is None
    torch.testing.assert_close(own(IDS), wanted)


@pytest.mark.parametrize("in_dims", [1, 2])
def test_vmap_over_ids(kind, in_dims):
    """Mapped ids give the results of a loop, and gradients of all parameters."""
    own = model(kind, num_layers=2, bidirectional=True, padding_idx=0)
    ids = torch.randint(V, (T, B, B))
    wanted = stacked([own(one) for one in ids.unbind(in_dims)])
    got = vmap(own, in_dims)(ids)
    torch.testing.assert_close(got, wanted, **EXACT)
    torch.testing.assert_close(gradients(got, own), gradients(wanted, own), **EXACT)
    state = vmap(own.last_state, in_dims)(ids)
    torch.testing.assert_close(state, wanted[1], **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(vmap(own.last_state, in_dims)(ids), wanted[1], **EXACT)
    nested = vmap(vmap(own.last_state, 1), 0, 1)(ids.unsqueeze(0))
    nested = map_states(nested, lambda state: state.squeeze(1))
    torch.testing.assert_close(nested, stacked([own(i)[1] for i in ids.unbind(1)]))


def test_vmap_over_lengths(kind):
    own = model(kind, num_layers=2)
    lengths = torch.randint(T + 1, (4, B))
    garbage = IDS.masked_fill(torch.arange(T)[:, None] >= lengths.amax(0), -9)

    def run(lengths):
        return own(garbage, lengths=lengths)

    torch.testing.assert_close(vmap(run)(lengths), stacked(map(run, lengths)))


class Methods(nn.Module):
    """A module whose forward calls a given method of the module it wraps."""

    def __init__(self, module, method="last_state"):
        super().__init__()
        self.m, self.method = module, method

    def forward(self, ids):
        return getattr(self.m, self.method)(ids)


def called(module, method, parameters, ids):
    """Calls a method with other parameters, and returns its results as a flat list."""
    named = {f"m.{name}": parameter for name, parameter in parameters.items()}
    return tree_leaves(functional_call(Methods(module, method), named, (ids,)))


@pytest.mark.parametrize("method", ["forward", "last_state"])
def test_vmap_over_models(kind, method):
    models = [model(kind, num_layers=2) for _ in range(4)]
    parameters, _ = torch.func.stack_module_state(models)
    wanted = stacked([called(m, method, dict(m.named_parameters()), IDS) for m in models])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            got = vmap(lambda of_one: called(models[0], method, of_one, IDS))(parameters)
        torch.testing.assert_close(got, wanted, **EXACT)


def test_an_id_without_a_row_under_vmap(kind):
    """Under vmap the error names no place: the caller does not know the folded ids."""
    ids = IDS.repeat(2, 1, 1)
    ids[1, 2, 2] = V
    with pytest.raises(IndexError, match="input must hold ids from 0 to 5, the rows of embedding"):
        vmap(model(kind))(ids)
    own = model(kind)
    vmap(lambda one: own(one, lengths=torch.tensor([T, T, 2])))(ids)


@pytest.mark.parametrize("method", ["forward", "last_state"])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_per_sample_gradients(kind, method, padding_idx):
    own = model(kind, num_layers=2, bidirectional=True, padding_idx=padding_idx)
    parameters = {name: p.detach() for name, p in own.named_parameters()}

    def loss(parameters, ids):
        return sum(result.square().sum() for result in called(own, method, parameters, ids))

    ids = torch.randint(V, (4, T, B))
    got = vmap(grad(loss), (None, 0))(parameters, ids)
    for k, one in enumerate(ids):
        own.zero_grad()
        loss(dict(own.named_parameters()), one).backward()
        for name, p in own.named_parameters():
            torch.testing.assert_close(got[name][k], p.grad, **EXACT)


def test_forward_mode_and_hessians(kind):
    own = model(kind)
    parameters = {name: p.detach() for name, p in own.named_parameters()}

    def states(parameters):
        return functional_call(own, parameters, (IDS,))[1]

    def of_rows(parameters):
        rows = parameters["embedding.weight"][IDS]
        layer = {k.removeprefix("rnn."): v for k, v in parameters.items() if k[0] == "r"}
        return functional_call(own.rnn, layer, (rows,))[1]

    for transform in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        got, wanted = transform(states)(parameters), transform(of_rows)(parameters)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_explain(kind):
    kernel = f"cpu {ops.cpu_kernel()}" if availability.HAS_EXTENSION else kind.without_kernel
    own, ids = kind.tokens(9, D, 64), torch.randint(9, (5, 200))
    explained = explain(own, ids)
    needed = "the output is needed"
    assert explained.path == kernel
    assert explained.shortcuts == ("table",)
    assert explained.why_no_shortcut == {"last state": needed, "shared prefixes": needed}
    with torch.no_grad():
        explained = explain(own, ids, last_state=True)
        assert explained.shortcuts == ("table", "last state", "shared prefixes")
        assert not explained.why_no_shortcut
        assert str(explained).startswith(f"{kernel} with table, last state, shared prefixes (")
        with batch_invariant():
            assert explain(own, ids, last_state=True).shortcuts == ("last state",)
    explained = explain(own, pack_sequence([*ids.T]), last_state=True)
    assert explained.shortcuts == ("table", "shared prefixes")
    assert explained.why_no_shortcut == {"last state": "the backward pass reads the output"}
    assert "not last state: the backward pass reads the output" in str(explained)
    with torch.autocast("cpu", torch.bfloat16):
        explained = explain(own, ids, last_state=True)
        if "padded" in kind.spec.autocasts_only_products:
            assert explained.path == kernel
            assert "shared prefixes" in explained.shortcuts
        else:
            assert explained.path == f"cpu {ops.cpu_kernel(torch.bfloat16)}"
            assert "not in torch.bfloat16" in explained.why_no_shortcut["shared prefixes"]
    dropped, hooked = kind.tokens(9, D, 64, 2, dropout=0.5), kind.tokens(9, D, 64)
    hooked.embedding.register_forward_hook(lambda *arguments: None)
    for layer, input, more, name, reason in (
        (own, ids[:, :1], {}, "table", "multiplying 5 ids is less work than multiplying 9 rows"),
        (own, ids[:, :1], {}, "shared prefixes", "it pays off from 128 sequences, not for 1"),
        (
            own,
            ids,
            {"hx": kind.states(torch.zeros, 1, 200, 64)},
            "shared prefixes",
            "its own initial state",
        ),
        (own, ids, {"reset": ids > 9}, "shared prefixes", "reset restarts sequences"),
        (dropped, ids, {}, "last state", "dropout needs the output of each layer"),
        (hooked, ids, {}, "table", "the embedding has hooks"),
    ):
        explained = explain(layer, input, last_state=True, **more)
        assert explained.why_no_shortcut[name].endswith(reason)


def test_explain_dropout_of_a_single_layer(kind):
    """Dropout acts between layers, so a single layer shares prefixes in training too."""
    layer, ids = kind.layer(D, 64, dropout=0.5), torch.randint(9, (5, 200))
    explained = explain(layer, ids, embedding=torch.randn(9, D), last_state=True)
    assert "shared prefixes" in explained.shortcuts


def test_explain_of_an_embedding_and_of_rows(kind):
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
    with pytest.raises(TypeError, match=r"a fused layer, cell or token layer .*, got Linear"):
        explain(nn.Linear(2, 2), rows)


def test_explain_without_a_kernel(kind, monkeypatch):
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    explained = explain(kind.tokens(9, D, 64), torch.randint(9, (5, 200)), last_state=True)
    assert explained.path == kind.without_kernel
    missing = {"shared prefixes": "the C++ extension was not built"}
    if kind.without_kernel == "reference":
        missing["last state"] = "the PyTorch operators in reference.py compute every state"
        assert explained.shortcuts == ("table",)
    else:
        missing["last state"] = "torch's own operator returns every state"
        missing["table"] = "torch's own operator takes rows of features"
        assert explained.shortcuts == ()
    assert explained.why_no_shortcut == missing


def test_tracing_of_the_last_state(kind):
    own = model(kind)
    program = torch.jit.trace(Methods(own), IDS)
    ids = torch.randint(V, (T + 2, B + 1))
    torch.testing.assert_close(program(ids), own(ids)[1], **EXACT)


def test_quantization_of_the_embedding(kind):
    """The module calls whatever another tool puts in place of the embedding."""
    own = kind.tokens(V, D, H)
    embedding = copy.deepcopy(own.embedding)
    embedding.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    own.embedding = torch.ao.nn.quantized.Embedding.from_float(embedding)
    torch.testing.assert_close(own(IDS), own.rnn(own.embedding(IDS)))
