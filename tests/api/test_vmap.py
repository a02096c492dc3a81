"""Compares `torch.func.vmap` with a loop over inputs, states, lengths, resets and models."""

import pytest
import torch
from kinds import flat, for_variants, tensors_in
from layouts import tensors_of
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map

from namernn_fast import ops
from namernn_fast.machine import availability

pytestmark = for_variants
K = 3
STACK = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}


def inputs(kind, batch_first=False, mapped=K):
    lead = (mapped,) if mapped else ()
    x = torch.randn(*lead, *((4, 6, 3) if batch_first else (6, 4, 3)), dtype=torch.float64)
    return x, kind.states(torch.randn, *lead, 4, 4, 5, dtype=torch.float64)


def stacked(each, dim=0):
    """Stacks the results of several calls as vmap does."""
    return tree_map(lambda *results: torch.stack(results, dim), *each)


def kth(k, mapped):
    """Returns entry `k` of each mapped argument, which is a tensor or a pair of states."""
    return tree_map(lambda tensor: tensor[k], mapped)


def count_calls(monkeypatch):
    """Returns a list that records every operator call from now on."""
    calls = []
    original = ops.forward_untraced
    monkeypatch.setattr(ops, "forward_untraced", lambda *a: calls.append(a) or original(*a))
    return calls


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)], ids=str)
@pytest.mark.parametrize("out_dims", [0, 1])
def test_vmap_over_inputs_makes_one_call(kind, batch_first, in_dims, out_dims, monkeypatch):
    """vmap merges the mapped dimension into the batch, and makes one fused call."""
    module = kind.layer(3, 5, batch_first=batch_first, **STACK)
    pairs = [inputs(kind, batch_first, K if dim == 0 else None)[i] for i, dim in enumerate(in_dims)]
    for tensor in flat(pairs):
        tensor.requires_grad_()
    calls = count_calls(monkeypatch)
    got = vmap(module, in_dims, out_dims)(*pairs)
    assert len(calls) == (1 if availability.HAS_EXTENSION else 0)
    each = [
        module(*(t if dim is None else kth(k, t) for t, dim in zip(pairs, in_dims, strict=True)))
        for k in range(K)
    ]
    wanted = stacked(each, out_dims)
    torch.testing.assert_close(got, wanted)
    leaves = [*flat(pairs), *module.parameters()]
    got, wanted = flat(got), flat(wanted)
    weights = [torch.randn_like(w) for w in wanted]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, weights), torch.autograd.grad(wanted, leaves, weights)
    )


def test_vmap_over_lengths_and_resets_matches_a_loop(kind):
    both, module = kind.layer(3, 5, **STACK), kind.layer(3, 5, 4, dtype=torch.float64)
    x, hx = inputs(kind)
    lengths = torch.tensor([[6, 0, 3, 6], [1, 2, 3, 4], [6, 6, 6, 5]])
    reset = torch.rand(K, 6, 4) < 0.3
    after = kind.states(torch.randn, K, 6, 4, 4, 5, dtype=torch.float64)
    for arguments, dims in (
        ((lengths, reset), (0, 0)),
        ((lengths[1], reset), (None, 0)),
        ((lengths, reset, after), (0, 0, 0)),
        ((lengths, reset, kth(1, after)), (0, 0, None)),
    ):

        def run(x, hx, lengths, reset, reset_to=None):
            layer = both if reset_to is None else module
            return layer(x, hx, lengths=lengths, reset=reset, reset_to=reset_to)

        got = vmap(run, (0, 0, *dims))(x, hx, *arguments)
        each = [
            run(
                *kth(k, (x, hx)),
                *(a if d is None else kth(k, a) for a, d in zip(arguments, dims, strict=True)),
            )
            for k in range(K)
        ]
        torch.testing.assert_close(got, stacked(each))


def test_vmap_over_packed_data_matches_a_loop(kind):
    module = kind.layer(3, 5, **STACK)
    lengths = [6, 4, 4, 1]
    x, hx = inputs(kind)
    packed = [pack_padded_sequence(padded, lengths) for padded in x]
    sizes = packed[0].batch_sizes

    def run(data, hx):
        return tensors_of(module(PackedSequence(data, sizes), hx))

    data = torch.stack([p.data for p in packed])
    each = [run(*kth(k, (data, hx))) for k in range(K)]
    torch.testing.assert_close(vmap(run)(data, hx), stacked(each))


@pytest.mark.parametrize("of_each", [False, True])
def test_vmap_over_models_makes_one_call_per_model(kind, of_each, monkeypatch):
    """An ensemble makes one fused call per model, and trains like the separate models."""
    models = [kind.layer(3, 5, **STACK) for _ in range(K)]
    params, buffers = stack_module_state(models)
    x, hx = inputs(kind, mapped=K if of_each else None)
    calls = count_calls(monkeypatch)

    def run(params, x, hx):
        return functional_call(models[0], (params, buffers), (x, hx))

    dims = (0, 0, 0) if of_each else (0, None, None)
    got = vmap(run, dims)(params, x, hx)
    assert len(calls) == (K if availability.HAS_EXTENSION else 0)
    each = [m(*kth(k, (x, hx)) if of_each else (x, hx)) for k, m in enumerate(models)]
    wanted = stacked(each)
    torch.testing.assert_close(got, wanted)
    for results in (got, wanted):
        sum(r.square().sum() for r in flat(results)).backward()
    for name, together in params.items():
        separate = torch.stack([dict(m.named_parameters())[name].grad for m in models])
        torch.testing.assert_close(together.grad, separate)


def test_nested_vmap_and_vmap_over_cells_match_a_loop(kind):
    module = kind.layer(3, 5, **STACK)
    x = torch.randn(2, K, 6, 4, 3, dtype=torch.float64)
    nested = vmap(vmap(lambda x: module(x)[1]))(x)
    wanted = stacked([stacked([module(sample)[1] for sample in row]) for row in x])
    torch.testing.assert_close(nested, wanted)
    cell = kind.step_module(3, 5, dtype=torch.float64)
    rows = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(cell)(rows), cell(rows))


@pytest.mark.parametrize("with_hx", [False, True])
def test_per_sample_gradients_match_a_loop(kind, with_hx):
    module = kind.layer(3, 5, **STACK)
    x, hx = inputs(kind)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, x, hx):
        output, last = functional_call(module, params, (x, hx) if with_hx else (x,))
        return output.square().sum() + sum(state.sum() for state in tensors_in(last))

    got = vmap(grad(loss), (None, 0, 0))(params, x, hx)
    for k in range(K):
        wanted = grad(loss)(params, *kth(k, (x, hx)))
        for name, value in wanted.items():
            torch.testing.assert_close(got[name][k], value)


def test_vmap_over_a_packed_layout_suggests_padded_input(kind):
    if not availability.HAS_EXTENSION:
        pytest.skip("the C++ extension was not built")
    module = kind.layer(3, 5, **STACK)
    text = "vmap cannot map over the layout of packed or jagged sequences: map over padded input"
    sizes = torch.tensor([[2, 1], [2, 1]])
    with pytest.raises(ValueError, match=text):
        vmap(lambda s: module(PackedSequence(torch.zeros(3, 3).double(), s))[1])(sizes)
