"""Tests what cells may have besides what the cells of the package have, with the cells of
`tested_cells`: four states, heads, no weight_hh, means over rows, several inputs, given sums."""

import itertools

import pytest
import torch
from cases import FUSED
from drawn import check_results, drawn_cases
from hypothesis import given, settings, strategies
from kinds import EVERY, TESTED, flat, needs_extension
from layouts import check_derivatives
from torch.nn.utils.rnn import pack_padded_sequence

from namernn_fast import dispatch, explain, ops, reference
from namernn_fast.call import Call

pytestmark = needs_extension
EXACT = {"rtol": 1e-12, "atol": 1e-12}
D, H, T, B = 3, 6, 5, 4


def drawn(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype)


def layer_of(cell, **options):
    return FUSED[cell](D, H, dtype=torch.float64, **options)


def beside_of(cell, states, batch=B):
    """Returns the inputs besides x of a layer with this number of layers times directions."""
    inputs = EVERY[cell].cell.inputs
    return {i.name: drawn(T, batch, states * i.features(H)) for i in inputs}


# `with_means` has everything that `four_states` has.
CELLS = ["with_means", "independent", pytest.param("four_states", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cell", CELLS)
@given(data=strategies.data())
@settings(deadline=None, max_examples=settings.default.max_examples // 8)
def test_random_calls_meet_the_error_budget(cell, data):
    check_results(data.draw(drawn_cases(cell)))


@pytest.mark.parametrize("cell", [pytest.param("with_means", marks=pytest.mark.slow), *CELLS[1:]])
def test_derivatives_are_correct(cell):
    module = layer_of(cell, num_layers=2, bidirectional=True)
    names = [name for name, _ in module.named_parameters()]
    beside = beside_of(cell, 4, batch=2)
    leaves = [drawn(T, 2, D), *beside.values(), *(p.detach().clone() for p in module.parameters())]

    def run(x, *more):
        inputs = dict(zip(beside, more, strict=False))
        of_call = dict(zip(names, more[len(beside) :], strict=True))
        return flat(torch.func.functional_call(module, of_call, (x,), inputs))

    check_derivatives(run, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


@pytest.mark.parametrize("cell", [*TESTED])
def test_steps_prepared_layers_and_streams_match_the_layer(path, cell):
    layer = layer_of(cell)
    step = EVERY[cell].step_module(D, H, dtype=torch.float64)
    step.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, beside = drawn(T, B, D), beside_of(cell, 1)
    with torch.no_grad():
        output, last = layer(x, **beside)
        for module in (step, step.prepare()):
            state = None
            for t in range(T):
                state = module(x[t], state, **{name: rows[t] for name, rows in beside.items()})
            torch.testing.assert_close(state, tuple(s[0] for s in last), **EXACT)
        prepared = layer.prepare()
        torch.testing.assert_close(prepared(x, **beside), (output, last), **EXACT)
        for stream in (prepared.stream(B), step.prepare().stream(B)):
            torch.testing.assert_close(stream(x, **beside), output, **EXACT)
            states = [
                state.reshape_as(wanted) for state, wanted in zip(stream.states, last, strict=True)
            ]
            torch.testing.assert_close(states, [*last], **EXACT)
            stream.reset()
            for t in range(T):
                row = stream(x[t], **{name: rows[t] for name, rows in beside.items()})
                torch.testing.assert_close(row, output[t], **EXACT)


@pytest.mark.parametrize("cell", [*TESTED])
def test_token_layers_match_the_layer(path, cell):
    """Without weight_hh, the shape of weight_ih or of its table gives hidden_size."""
    tokens = EVERY[cell].tokens(7, D, H, num_layers=2, dtype=torch.float64)
    ids, reset = torch.randint(7, (T, B)), torch.rand(T, B) < 0.5
    reset_to = tuple(drawn(T, 2, B, H) for _ in EVERY[cell].cell.states)
    x = tokens.embedding(ids)
    for more in ({}, {"reset": reset, "reset_to": reset_to}, {"hx": tuple(s[0] for s in reset_to)}):
        wanted = tokens.rnn(x, **more)
        torch.testing.assert_close(tokens(ids, **more), wanted, **EXACT)
        with torch.no_grad():
            torch.testing.assert_close(tokens.prepare()(ids, **more), wanted, **EXACT)
            torch.testing.assert_close(tokens.last_state(ids, **more), wanted[1], **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_shared_inputs_equal_repeated_inputs(path, training):
    layer = layer_of("with_means", num_layers=2, bidirectional=True, dropout=0.5 * training)
    x, shared = drawn(T, B, D), beside_of("with_means", 1)
    shared = {name: rows.requires_grad_() for name, rows in shared.items()}
    repeated = {name: rows.repeat(1, 1, 4) for name, rows in shared.items()}
    results = []
    for inputs in (shared, repeated):
        torch.manual_seed(1)
        output, last = layer(x, **inputs)
        total = output.sum() + sum(state.square().sum() for state in last)
        results.append((output, *last, *torch.autograd.grad(total, [*shared.values()])))
    torch.testing.assert_close(*results, **EXACT)


def test_missing_inputs_are_zeros(path):
    layer, x, beside = layer_of("four_states"), drawn(T, B, D), beside_of("four_states", 1)
    packed = pack_padded_sequence(x, [5, 3, 3, 1])
    for name, rows in beside.items():
        zeros = {other: torch.zeros_like(more) for other, more in beside.items()} | {name: rows}
        torch.testing.assert_close(layer(x, **{name: rows}), layer(x, **zeros), **EXACT)
        inputs = {name: pack_padded_sequence(rows, [5, 3, 3, 1])}
        everything = {k: pack_padded_sequence(v, [5, 3, 3, 1]) for k, v in zeros.items()}
        outputs = [layer(packed, **given)[0].data for given in (inputs, everything)]
        torch.testing.assert_close(*outputs, **EXACT)
    with pytest.raises(RuntimeError, match=r"attention must have shape \(5, 4, 1\), got"):
        layer(x, attention=drawn(T, B, 2))


# Norms and differences of exponents amplify the rounding of ATen operators in 16 bits.
AMPLIFYING = ("layer_norm_lstm", "layer_norm_gru", "slstm")
TAKING_SUMS = [
    (cell, dtype)
    for cell in EVERY
    for dtype in (torch.float64, torch.bfloat16)
    if cell != "projected" and (dtype == torch.float64 or cell not in AMPLIFYING)
]
LAYOUTS = {
    "dense": (0, None),
    "batch first": (ops.BATCH_FIRST, None),
    "lengths": (0, torch.tensor([5, 0, 3, 2])),
    "packed": (ops.PACKED, torch.tensor([4, 3, 3, 1, 1])),
    "jagged": (ops.JAGGED, torch.tensor([0, 5, 5, 8, 12])),
}


@pytest.mark.parametrize("layout", [*LAYOUTS])
@pytest.mark.parametrize(("cell", "dtype"), TAKING_SUMS, ids=str)
def test_given_sums_equal_the_reference(cell, layout, dtype):
    """Given sums get the gradient that W_ih x_t would get."""
    for bidirectional, bias in itertools.product([False, True], repeat=2):
        layer = FUSED[cell](D, H, bias=bias, bidirectional=bidirectional, dtype=dtype)
        lists, directions = layer._cell, 1 + bidirectional
        bits, borders = LAYOUTS[layout]
        options = layer._options(layer._weights()) | bits | ops.SUMS
        weights = [w for name, w in layer.named_parameters() if not name.startswith("weight_ih")]
        if not weights:
            continue
        rows = (12,) if layout in ("packed", "jagged") else (B, T) if bits else (T, B)
        x = drawn(*rows, D, dtype=dtype)
        inputs = [layer.weight_ih_l0, *([layer.weight_ih_l0_reverse] if bidirectional else [])]
        sums = torch.cat([x @ weight.t() for weight in inputs], -1).detach().requires_grad_()
        beside = [drawn(*rows, directions * i.features(H), dtype=dtype) for i in lists.inputs]
        call = Call(lists, weights, options, sums, borders, beside=beside)
        results = []
        for run in (dispatch.run, reference.run_stack):
            results.append(run(call))
            total = sum(result.square().sum() for result in results[-1])
            results[-1] += torch.autograd.grad(total, [sums, *weights])
        tolerance = EXACT if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(*results, **tolerance)


def test_wrong_sums_are_rejected():
    layer = layer_of("four_states")
    weights, options = layer._weights()[1:], ops.BIAS | ops.SUMS
    for cell, x, tensors, bits, text in (
        (4, drawn(T, B, 2 * H + 1), weights, options, "input must have 12 sums for each step"),
        (
            4,
            torch.zeros(T, B, dtype=torch.int64),
            weights,
            options,
            "must hold sums, not token ids",
        ),
        (4, drawn(T, B, 2 * H), weights * 2, options, "SUMS for a single layer only"),
        (6, drawn(T, B, 2 * H), [], ops.SUMS, "tensors must hold|weights must hold"),
    ):
        with pytest.raises(RuntimeError, match=text):
            ops.forward(cell, x, tensors, None, None, bits, 0)


def test_wrong_sums_raise_the_layers_error():
    layer = layer_of("independent")
    call = Call(layer._cell, [layer.bias_ih_l0], ops.BIAS | ops.SUMS, drawn(T, B, 2 * H - 1))
    with pytest.raises(RuntimeError, match=r"equal to input_size\. Expected 10, got 11"):
        dispatch.run(call)


@pytest.mark.parametrize("heads", [0, 4, 7, 1.5, True])
def test_heads_must_divide_the_hidden_size(heads):
    with pytest.raises(ValueError, match=r"heads must be a divisor of hidden_size \(6\), got"):
        layer_of("four_states", heads=heads)


def test_weights_of_the_wrong_number_of_heads_are_rejected(path):
    layer = layer_of("four_states")
    layer.weight_hh_l0 = torch.nn.Parameter(drawn(2 * H, 4))
    with pytest.raises(RuntimeError, match=r"weight_hh must have shape \(12, 6\), got \(12, 4\)"):
        layer(drawn(T, B, D))


@pytest.mark.parametrize("cell", [*TESTED])
def test_lower_precision_and_8_bits_compute_in_float(cell, cpu_precision):
    layer, x = FUSED[cell](D, H).requires_grad_(False), drawn(T, B, D, dtype=torch.float32)
    wanted = layer(x)
    cpu_precision("medium")
    assert torch.equal(layer(x)[0], wanted[0])
    reason = explain(layer, x).why_not["bfloat16 products"]
    why = "the independent cell" if cell == "independent" else "heads"
    assert reason == f"the kernels with bfloat16 instructions do not support {why}"
    prepared = layer.prepare(torch.int8)
    rounded = FUSED[cell](D, H)
    rounded.load_state_dict(dict(zip(rounded.state_dict(), prepared._weights(), strict=True)))
    torch.testing.assert_close(prepared(x), rounded(x))
    assert explain(prepared, x).path == explain(layer, x).path
