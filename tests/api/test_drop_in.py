"""Tests what programs written for `nn.RNN`, `nn.GRU` or `nn.LSTM` need besides equal results."""

import numpy as np
import pytest
import torch
from kinds import KINDS, flat, for_variants, map_states, tensors_in
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

from namernn_fast import (
    batch_invariant,
    explain,
    last_state,
    lstm,
    ops,
)
from namernn_fast.machine import availability

XS = torch.randn(2, 6, 3), torch.randn(5, 9, 3)
EXACT = {"rtol": 0, "atol": 0}


@for_variants
@pytest.mark.covering(2)
@pytest.mark.parametrize("how", ["dense", "lengths", "reset", "evaluation"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_masks_match_torchs_layer(kind, path, batch_first, bidirectional, how):
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "dropout": 0.5}
    x, never = XS[0], torch.zeros(2, 6, dtype=torch.bool)
    if not batch_first:
        x, never = x.transpose(0, 1), never.t()
    ours, theirs = kind.twins(3, 16, 3, **options)
    more = {"lengths": {"lengths": [6, 6]}, "reset": {"reset": never}}.get(how, {})
    results = []
    for module, arguments in ((ours, more), (theirs, {})):
        module.train(how != "evaluation")
        torch.manual_seed(1)
        results.append(module(x, **arguments))
    torch.testing.assert_close(*results)


@for_variants
@pytest.mark.covering(2)
@pytest.mark.parametrize("lengths", [None, (), [], np.array([]), torch.tensor([]).long()], ids=repr)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_an_empty_batch_matches_torch(kind, path, options, batch_first, lengths):
    ours, theirs = kind.twins(3, 5, batch_first=batch_first, **options)
    found = []
    for module, more in ((ours, {"lengths": lengths}), (theirs, {})):
        x = torch.zeros((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)
        results = flat(module(x, **more))
        sum(result.sum() for result in results).backward()
        found.append([*results, x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_lengths_are_copied(kind):
    """Changing the caller's lengths after the forward pass does not affect the backward pass."""
    module, lengths = kind.layer(3, 4, batch_first=True), np.array([6, 2])
    x = XS[0].clone().requires_grad_()
    output, _ = module(x, lengths=lengths)
    lengths[:] = 1
    output.sum().backward()
    assert x.grad[0].ne(0).all()
    with torch.device("meta"):
        module(XS[0], lengths=[6, 2])


def test_states_of_an_lstm_may_be_a_list():
    x, states = torch.randn(6, 2, 3), torch.randn(2, 1, 2, 4).unbind()
    for module, input, hx in (
        (KINDS["lstm"].layer(3, 4), x, states),
        (KINDS["lstm"].step_module(3, 4), x[0], [state[0] for state in states]),
    ):
        got, wanted = (flat(module(input, of(hx))) for of in (list, tuple))
        assert all(map(torch.equal, got, wanted))


def test_offsets_may_be_int32_but_must_be_valid(kind, path):
    """Offsets that decrease or omit rows raise an error on the kernel and reference paths."""
    module, values = kind.layer(3, 4), torch.randn(8, 3)
    results = [
        module(torch.nested.nested_tensor_from_jagged(values, offsets))
        for offsets in (torch.tensor([0, 5, 8]), torch.tensor([0, 5, 8], dtype=torch.int32))
    ]
    torch.testing.assert_close(results[0][0].values(), results[1][0].values())
    for offsets, text in (
        ([0, 5, 3, 8], "offsets must not decrease, got 3 after 5 at index 2"),
        ([0, 5, 7], r"offsets must start with 0 and end with 8 \(the rows of data\), got 0 and 7"),
    ):
        bad = torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets))
        with pytest.raises(RuntimeError, match=text):
            module(bad)


@for_variants
def test_flop_counts_match_torchs_layer(kind):
    """The counts of the forward and backward pass match if every gradient is needed.

    The test turns oneDNN off, because torch does not count FLOPs in oneDNN, which computes
    `nn.LSTM` by default.
    """
    options = {"num_layers": 2, "bidirectional": True}
    counts = []
    for module in (kind.layer(3, 4, **options), kind.nn_layer(3, 4, **options)):
        x = torch.randn(6, 2, 3, requires_grad=True)
        hx = kind.states(torch.randn, 4, 2, 4, requires_grad=True)
        with (
            torch.backends.mkldnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
        ):
            output, _ = module(x, hx)
            forward = counter.get_total_flops()
            output.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    layer = kind.layer(3, 4).requires_grad_(False)
    h_size = layer.proj_size or 4
    projection = layer.proj_size * 4
    for run in (layer, layer.prepare()):
        with FlopCounterMode(display=False) as counter:
            run(torch.randn(6, 2, 3), lengths=[2, 3])
            run(pack_padded_sequence(torch.randn(6, 2, 3), [6, 1]))
        products = kind.gates * 4 * (3 + h_size) + projection
        assert counter.get_total_flops() == 2 * (5 + 7) * products


def test_flops_of_token_ids_are_counted(kind):
    """Torch counts the table's matrix product, and our operator counts the recurrent products."""
    vocabulary, ids = 7, torch.zeros(6, 2, dtype=torch.int64)
    rows = kind.gates * 4
    table, states = 2 * vocabulary * rows * 3, 2 * 12 * rows * 4
    layer, embedding = kind.layer(3, 4), torch.randn(vocabulary, 3, requires_grad=True)
    for method in ("forward", "last_state"):
        run = getattr(layer, method)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(ids, embedding=embedding)
        assert counter.get_total_flops() == table + states
        with FlopCounterMode(display=False) as counter:
            tensors_in(run(ids, embedding=embedding))[0].sum().backward()
        assert counter.get_total_flops() == 3 * table + 3 * states


def test_invalid_uses_of_projections_raise_errors(path):
    layer, x = KINDS["lstm"].layer(3, 4, proj_size=2), XS[0]
    assert explain(layer, x).path == (f"cpu {ops.cpu_kernel()}" if path == "kernel" else "torch")
    with pytest.raises(ValueError, match="projections must be False for cell='gru', got True"):
        last_state(x, None, KINDS["gru"].layer(3, 4)._flat_weights, cell="gru", projections=True)
    weights = [*KINDS["lstm"].layer(3, 4).parameters()]
    with pytest.raises(ValueError, match=r"hold 5 tensors .*projections=True\), got 4"):
        lstm(x, None, weights, projections=True)
    half = KINDS["lstm"].layer(3, 4, proj_size=2, dtype=torch.bfloat16)
    if path == "kernel":  # also if the processor has bfloat16 instructions
        assert explain(half, x.bfloat16()).path == f"cpu {ops.cpu_kernel()}"
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"share_prefixes=True .* do not support proj_size"):
        layer.last_state(ids, embedding=torch.zeros(5, 3), share_prefixes=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("rnn", {}), ("rnn", {"nonlinearity": "relu"}), ("gru", {}), ("lstm", {})],
)
@pytest.mark.parametrize("bias", [True, False])
def test_steps_match_torchs_cell(name, options, bias, steps):
    """Steps that run torch's own cell are bit-identical. Batch-invariant steps run the kernel."""
    kind = KINDS[name]
    ours, theirs = (cls(3, 64, bias, **options) for cls in (kind.step_module, kind.nn_step_module))
    ours.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(64, 3), kind.states(torch.randn, 64, 64)
    wanted = theirs(x, hx)
    fused = steps == "fused" and kind.gates > 1 and availability.HAS_EXTENSION
    torch.testing.assert_close(ours(x, hx), wanted, **{} if fused else EXACT)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        with batch_invariant():
            got = ours(x, hx)
            torch.testing.assert_close(got, wanted)
            alone = ours(x[:1], map_states(hx, lambda state: state[:1]))
            torch.testing.assert_close(alone, map_states(got, lambda state: state[:1]), **EXACT)
            row = ours(x[0], map_states(hx, lambda state: state[0]))
            torch.testing.assert_close(row, map_states(got, lambda state: state[0]), **EXACT)
    mapped = torch.func.vmap(ours)(x[None], map_states(hx, lambda state: state[None]))
    torch.testing.assert_close(map_states(mapped, lambda state: state[0]), wanted)
