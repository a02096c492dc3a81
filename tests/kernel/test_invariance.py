"""Tests `batch_invariant`: a sequence's results are bit-identical in every batch."""

import pytest
import torch
from cases import CELLS, DTYPES, FUSED, LAYERS
from kinds import flat, needs_extension
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import namernn_fast
from namernn_fast.machine import availability

T, MANY = 9, 257
SIZES = (1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100, 256, 257)

pytestmark = needs_extension


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("features", [(16, 32), (5, 70)], ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_sequence_has_bit_identical_results_in_any_batch(cell, dtype, options, features, threads):
    module = FUSED[cell](*features, batch_invariant=True, dtype=dtype, **options)
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(T, MANY, features[0], generator=generator).to(dtype)
    lengths = torch.randint(1, T + 1, (MANY,), generator=generator)
    lengths[: MANY // 2] = T
    threads(1)
    alone = [flat(module(x[:n, b : b + 1])) for b, n in enumerate(lengths.tolist())]
    outputs, *last = zip(*alone, strict=True)
    output = torch.nn.utils.rnn.pad_sequence([sequence[:, 0] for sequence in outputs])
    last = [torch.cat(states, 1) for states in last]
    whole = (lengths == T).nonzero().squeeze(1)
    for count in (1, 2, 4):
        threads(count)
        for size in SIZES:
            places = torch.randperm(MANY, generator=generator)[:size]
            got = flat(module(x[:, places], lengths=lengths[places]))
            packed = pack_padded_sequence(x[:, places], lengths[places], enforce_sorted=False)
            unpacked, *states = flat(module(packed))
            unpacked, _ = pad_packed_sequence(unpacked, total_length=T)
            for results in (got, (unpacked, *states)):
                wanted = tuple(tensor[:, places] for tensor in (output, *last))
                torch.testing.assert_close(results, wanted, rtol=0, atol=0)
            dense = whole[torch.randperm(len(whole), generator=generator)[:size]]
            assert torch.equal(module(x[:, dense])[0], output[:, dense])


@pytest.mark.parametrize("cell", CELLS)
def test_an_option_or_a_context_manager_enables_batch_invariance(cell):
    """Without the option, a sequence's results alone and in a batch of 16 differ in some bits."""
    plain = FUSED[cell](64, 64)
    invariant = FUSED[cell](64, 64, batch_invariant=True)
    invariant.load_state_dict(plain.state_dict())
    x = torch.randn(8, 1, 64)
    wanted = plain(x.expand(8, 16, 64))[0][:, :1]
    assert not torch.equal(plain(x)[0], wanted)
    assert torch.equal(invariant(x)[0], wanted)
    with namernn_fast.batch_invariant():
        assert torch.equal(plain(x)[0], wanted)
        with namernn_fast.batch_invariant(False):
            assert not torch.equal(plain(x)[0], wanted)
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x)[0], wanted)
    assert not torch.equal(plain(x)[0], wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_batch_invariance_is_rejected_without_the_fused_kernel(cell, monkeypatch):
    module, x = FUSED[cell](3, 4, batch_invariant=True), torch.zeros(2, 1, 3)
    text = "batch_invariant needs the fused kernel"
    with pytest.raises(RuntimeError, match=f"{text}: a torch.func transform"):
        torch.func.grad(lambda x: module(x)[0].sum())(x)
    monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    with pytest.raises(RuntimeError, match=rf"{text}: the C\+\+ extension"):
        module(x)
