"""Tests that prepared layers, whose weights are packed once, match the original layers."""

from concurrent.futures import ThreadPoolExecutor

import operators
import pytest
import torch
from cases import CELLS, DTYPES, FUSED, LAYERS
from kinds import EVERY, KINDS, flat, map_states, needs_extension
from layouts import calls_of, tensors_of
from torch.testing import assert_close

from namernn_fast import explain, ops, prepared_ops
from namernn_fast.cells import NUMBERED
from namernn_fast.nn.inference import prepared as prepared_module
from namernn_fast.testing import ErrorBudget

EXACT = {"rtol": 0, "atol": 0}
SIZES = ((5, 8), (16, 32), (70, 100), (64, 130))
OPTIONS = (
    {},
    {"num_layers": 2, "bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
)
pytestmark = [needs_extension, pytest.mark.covering(1)]


def check_bits(got, wanted):
    assert_close(tensors_of(got), tensors_of(wanted), **EXACT)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("features", SIZES, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_prepared_and_batch_invariant_results_are_equal(cell, features, options, dtype, threads):
    """A batch-invariant layer always packs its weights, so both layers sum in the same order."""
    layer = FUSED[cell](*features, dtype=dtype, batch_invariant=True, **options)
    layer.requires_grad_(False)
    prepared = layer.prepare()
    for count in (1, 2):
        threads(count)
        for name, arguments, more in calls_of(layer, dtype):
            check_bits(prepared(*arguments, **more), layer(*arguments, **more))
            if name != "jagged":
                wanted = layer.last_state(*arguments, **more)
                assert_close(prepared.last_state(*arguments, **more), wanted, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_prepared_layer_matches_the_layer_bit_for_bit_on_large_batches(cell, steps, dtype):
    layer = FUSED[cell](24, 40, 2, dtype=dtype).requires_grad_(False)
    x = torch.randn(steps, 40, 24).to(dtype)
    check_bits(layer.prepare()(x), layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_prepared_layer_meets_the_error_budget_on_small_batches(cell, batch, dtype):
    """On small batches, the original layer reads weights in place, which changes the last bits."""
    ours, theirs = EVERY[cell].twins(512, 300, dtype=dtype)
    precise = EVERY[cell].nn_layer(512, 300, dtype=torch.float64)
    precise.load_state_dict(theirs.state_dict())
    prepared, budget = ours.prepare(), ErrorBudget(dtype)
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(3, batch, 512, generator=torch.Generator().manual_seed(seed)).to(dtype)
            exact = flat(precise(x.double()))
            results = zip(flat(prepared(x)), flat(theirs(x)), exact, strict=True)
            for name, (got, rival, wanted) in zip("ohc", results, strict=False):
                budget.add(name, got, rival, wanted.numpy())
    budget.check()


@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("cell", CELLS)
def test_lower_precision_results_match_the_layer_bit_for_bit(cell, precision, cpu_precision):
    layer = FUSED[cell](48, 160, 2).requires_grad_(False)
    prepared = layer.prepare()
    x = torch.randn(32, 40, 48)
    full = layer(x)
    check_bits(prepared(x), full)
    cpu_precision(precision)
    check_bits(prepared(x), layer(x))
    check_bits(prepared(x[:1]), layer(x[:1]))
    check_bits(prepared(x[:, :1]), layer(x[:, :1]))
    if "bfloat16" in explain(prepared, x).path or "amx" in explain(prepared, x).path:
        assert not torch.equal(prepared(x)[0], full[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_token_results_match_the_layer_bit_for_bit(cell, options, with_table, dtype, monkeypatch):
    """The layer computes a table in each call that has at least as many ids as embedding rows."""
    if not with_table:
        monkeypatch.setattr(prepared_module, "MOST_TABLE_BYTES", 0)
    vocabulary = 31 if with_table else 2000
    model = KINDS[cell].tokens(vocabulary, 12, 40, padding_idx=0, dtype=dtype, **options)
    model.requires_grad_(False)
    prepared = model.prepare()
    assert prepared._panels.has_table == with_table
    ids = torch.randint(vocabulary, (17, 29))
    seq_len, batch = (29, 17) if model.rnn.batch_first else (17, 29)
    lengths = torch.randint(seq_len + 1, (batch,))
    for more in ({}, {"lengths": lengths}):
        check_bits(prepared(ids, **more), model(ids, **more))
        assert_close(prepared.last_state(ids, **more), model.last_state(ids, **more), **EXACT)
    assert ("table" in explain(prepared, ids).shortcuts) == with_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_prepared_layer_with_shared_prefixes_matches_the_layer_bit_for_bit(cell, dtype):
    model = KINDS[cell].tokens(3, 8, 64, 2, dtype=dtype).requires_grad_(False)
    prepared, ids = model.prepare(), torch.randint(3, (12, 400))
    assert "shared prefixes" in explain(prepared, ids, last_state=True).shortcuts
    for share in (None, False):
        wanted = model.last_state(ids, share_prefixes=share)
        assert_close(prepared.last_state(ids, share_prefixes=share), wanted, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_a_prepared_token_layer_computes_its_table_only_once(cell, monkeypatch):
    prepared = KINDS[cell].tokens(31, 12, 40).prepare()
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # computes a table
    prepared(torch.randint(31, (17, 29)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -0.0])
@pytest.mark.parametrize("cell", LAYERS)
def test_the_state_dict_of_a_prepared_layer_has_the_original_weights(cell, value, dtype):
    layer = FUSED[cell](7, 70, 2, bidirectional=True, dtype=dtype).requires_grad_(False)
    for weight in layer.parameters():
        weight.view(-1)[-1] = value
        weight.view(-1)[0] = torch.finfo(dtype).smallest_normal / 2
    for name, weight in layer.prepare().state_dict().items():
        assert torch.equal(weight.nan_to_num(7), layer.state_dict()[name].nan_to_num(7)), name
        assert torch.equal(weight.signbit(), layer.state_dict()[name].signbit()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_packed_weights_take_at_most_5_percent_more_memory(cell, dtype):
    """The sizes fill whole panels, which need no padding. Only biases take more memory."""
    layer = FUSED[cell](128, 256, 2, dtype=dtype)
    elements = sum(weight.numel() for weight in layer.parameters())
    tensor = layer.prepare()._panels.tensor
    assert tensor.dtype == dtype
    assert elements <= tensor.numel() <= 1.05 * elements


@pytest.mark.parametrize("cell", CELLS)
def test_concurrent_calls_of_a_prepared_layer_are_bit_identical(cell, threads):
    threads(2)
    prepared = FUSED[cell](48, 96, 2).prepare()
    inputs = [torch.randn(steps, batch, 48) for steps in (1, 7, 30) for batch in (1, 5, 64)] * 6

    def run(x):
        with torch.no_grad():
            return prepared(x)

    alone = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, inputs), alone, strict=True):
            check_bits(got, wanted)


def arguments(prepared, x):
    """Returns the arguments of `prepared_ops.forward`."""
    panels = prepared._panels
    number, tensor = panels.cell.number, panels.tensor
    return number, x, (), tensor, panels.sizes, None, None, panels.options, 0


@pytest.mark.parametrize("cell", CELLS)
def test_operators_reject_tensors_packed_for_another_layer(cell):
    """A kernel that accepted a tensor packed for smaller sizes would read past its end."""
    prepared, x = FUSED[cell](8, 16, 2).prepare(), torch.randn(3, 2, 8)
    number, _, states, tensor, sizes, *rest = arguments(prepared, x)
    operators.forward_prepared(number, x, states, tensor, sizes, *rest)
    wrong = r"prepared must come from namernn_fast::prepare on a processor with the kernels"
    others = [
        (number, tensor, [1, *sizes[1:]], wrong),
        ((number + 1) % 3, tensor, sizes, wrong),
        (number, tensor[:100], sizes, wrong),
        (number, torch.zeros_like(tensor), sizes, wrong),
        (number, FUSED[cell](8, 17, 2).prepare()._panels.tensor, sizes, wrong),
        (number, tensor.double(), sizes, "input must have the dtype of the prepared layer"),
        (number, tensor, [2, 9, 16, 0, 16, 1], "input must have 9 features, got 8"),
        (number, tensor, [2, 0, 16, 5, 16, 1], "input must be token ids for this prepared layer"),
        (number, tensor, [2, 8, 16, 0, 7, 1], "size of h must be between 16 and 16, got 7"),
        (number, tensor, [2, 8, 16], "sizes must be num_layers, input_size, hidden_size"),
        (77, tensor, sizes, f"cell must be between 0 and {len(NUMBERED) - 1}, got 77"),
    ]
    with pytest.raises(RuntimeError, match="input must be features, not token ids, for this"):
        operators.forward_prepared(number, x[..., 0].long(), states, tensor, sizes, *rest)
    for number, tensor, sizes, message in others:
        with pytest.raises(RuntimeError, match=message):
            operators.forward_prepared(number, x, states, tensor, sizes, *rest)
        if message == wrong:
            with pytest.raises(RuntimeError, match=message):
                prepared_ops.unpack(tensor, number, sizes, prepared._panels.options)
    *first, options, trees = arguments(prepared, x)
    with pytest.raises(RuntimeError, match="WANT_SAVED"):
        operators.forward_prepared(*first, options | ops.WANT_SAVED, trees)


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_for_prepared_layers_passes_opcheck(cell, dtype):
    layer = FUSED[cell](8, 16, 2, bidirectional=True)
    torch.library.opcheck(
        prepared_ops.forward,
        operators.prepared_arguments(*arguments(layer.prepare(dtype), torch.randn(3, 2, 8))),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 5, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_a_prepared_step_module_matches_a_prepared_layer_bit_for_bit(cell, batch, dtype):
    kind = KINDS[cell]
    layer, step = kind.layer(24, 40, dtype=dtype), kind.step_module(24, 40, dtype=dtype)
    for mine, theirs in zip(step.parameters(), layer.parameters(), strict=True):
        mine.data.copy_(theirs)
    x = torch.randn(2 * batch, 48).to(dtype)[::2, ::2]
    hx = kind.states(torch.randn, 2 * batch, 40)
    hx = map_states(hx, lambda state: state[::2].to(dtype))
    for states in (hx, None):
        got = step.prepare()(x, states)
        with_layer = None if states is None else map_states(states, lambda h: h.unsqueeze(0))
        _, wanted = layer.prepare()(x.unsqueeze(0), with_layer)
        assert_close(got, map_states(wanted, lambda state: state.squeeze(0)), **EXACT)
