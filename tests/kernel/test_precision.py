"""Tests that float32 layers multiply in lower precision only if torch's settings allow it."""

import math

import operators
import pytest
import torch
from cases import CELLS, FUSED, Case
from kinds import KINDS, flat, needs_extension
from layouts import loss_of, trained

from benchmarks.harness.precision import SETTINGS
from namernn_fast import explain, ops
from namernn_fast.testing import ErrorBudget

LOWER = ("medium", "high")
BITS = {"highest": 0, "high": ops.HIGH_PRECISION, "medium": ops.MEDIUM_PRECISION}
# (input_size, hidden_size, seq_len, batch). At least one shape is large enough to use `high`.
SHAPES = [(16, 48, 5, 1), (9, 33, 12, 7), (40, 130, 1, 80), (20, 130, 32, 16)]

pytestmark = needs_extension


def terms(shape, precision):
    """Returns how many bfloat16 numbers the kernel splits each float32 number into, or 0."""
    _, hidden_size, steps, batch = shape
    return ops.cpu_terms(BITS[precision], steps, batch, steps * batch, hidden_size)


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.covering(2)
@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("layout", ["dense", "packed", "lengths"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_results_meet_the_error_budget_of_the_set_precision(
    cell, precision, layout, options, with_hx, cpu_precision
):
    """Processors without bfloat16 instructions use full precision, which meets the budget, too."""
    cpu_precision(precision)
    budget = ErrorBudget(torch.float32, precision=precision)
    for seed, shape in enumerate(SHAPES):
        vocabulary = 11 if seed == 1 else 0
        case = Case(*shape, options, layout, with_hx, seed, vocabulary, cell=cell)
        case.add_to(budget, torch.float32)
    budget.check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("cell", CELLS)
def test_precision_changes_results_only_with_bfloat16(cell, precision, shape, cpu_precision):
    features, hidden_size, steps, batch = shape
    module, x = FUSED[cell](features, hidden_size), torch.randn(steps, batch, features)
    usual = trained(module, x)
    cpu_precision(precision)
    assert all_equal(trained(module, x), usual) == (terms(shape, precision) == 0)
    cpu_precision("highest")
    assert all_equal(trained(module, x), usual)


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("cell", CELLS)
def test_a_layer_obeys_the_same_precision_setting_as_torchs_layer(cell, precision, cpu_precision):
    cpu_precision(precision)
    module, x = FUSED[cell](64, 130), torch.randn(9, 64, 64)
    lower = flat(module(x))
    matmul, rnn = torch.backends.mkldnn.matmul, torch.backends.mkldnn.rnn
    own, other = (rnn, matmul) if cell == "lstm" else (matmul, rnn)
    other.fp32_precision = "ieee"
    assert all_equal(flat(module(x)), lower)
    own.fp32_precision = "ieee"
    exact = flat(module(x))
    assert all_equal(exact, lower) == (terms((64, 130, 9, 64), precision) == 0)
    other.fp32_precision = SETTINGS[precision]
    assert all_equal(flat(module(x)), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_other_than_float32_ignore_the_precision_settings(cell, dtype, cpu_precision):
    module, x = FUSED[cell](20, 64, dtype=dtype), torch.randn(9, 64, 20, dtype=dtype)
    usual = trained(module, x)
    for precision in LOWER:
        cpu_precision(precision)
        assert all_equal(trained(module, x), usual)


@pytest.mark.parametrize("cell", CELLS)
def test_the_backward_pass_uses_the_precision_of_the_forward_pass(cell, cpu_precision):
    module, x = FUSED[cell](20, 64), torch.randn(9, 64, 20)
    cpu_precision("medium")
    wanted = trained(module, x)
    x = x.requires_grad_()
    results = flat(module(x))
    cpu_precision("highest")
    grads = torch.autograd.grad(loss_of(*results), [x, *module.parameters()])
    assert all_equal([*results, *grads], wanted)


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("cell", CELLS)
def test_thread_count_changes_no_bits_in_lower_precision(cell, precision, cpu_precision, threads):
    cpu_precision(precision)
    for batch in (1, 3, 70):
        module, x = FUSED[cell](33, 200), torch.randn(12, batch, 33)
        results = []
        for count in (1, 2, 4):
            threads(count)
            results.append(flat(module(x)))
        assert all(all_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("precision", ["highest", *LOWER])
@pytest.mark.parametrize("cell", CELLS)
def test_batch_invariance_holds_in_every_precision(cell, precision, cpu_precision):
    cpu_precision(precision)
    module = FUSED[cell](33, 130, batch_invariant=True)
    x = torch.randn(9, 300, 33)
    output, *last = flat(module(x))
    for size in (1, 2, 4, 15, 64, 129):
        first, *states = flat(module(x[:, :size]))
        assert torch.equal(first, output[:, :size])
        for state, wanted in zip(states, last, strict=True):
            assert torch.equal(state, wanted[:, :size])


@pytest.mark.parametrize("cell", CELLS)
def test_calls_that_share_prefixes_ignore_the_precision_settings(cell):
    """A speed estimate decides whether prefixes are shared, so it must not affect precision."""
    kind = KINDS[cell]
    table = torch.randn(30, kind.cell.gates * 64)
    weights = [table, *[p.detach() for p in FUSED[cell](1, 64).parameters()][1:]]
    ids = torch.randint(30, (6, 200))
    options = ops.BIAS | ops.LAST_STATE | ops.SHARE_PREFIXES | kind.bits
    _, usual, _ = operators.forward(kind.cell.number, ids, (), weights, None, None, options, 1)
    for bit in BITS.values():
        call = (kind.cell.number, ids, (), weights, None, None, options | bit, 1)
        assert all_equal(operators.forward(*call)[1], usual)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38], ids=str)
@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("cell", CELLS)
def test_infinity_and_nan_do_not_spread_to_other_sequences(cell, precision, value, cpu_precision):
    """At `medium`, an input that is infinite or rounds to infinity acts as in full precision.

    At `high`, each weight is split into two bfloat16 numbers. Their products with an infinite input
    may be infinities of opposite signs, whose sum is NaN.
    """
    module, x = FUSED[cell](64, 130), torch.randn(9, 64, 64)
    x[3, 5, 7] = value
    others = torch.tensor([b for b in range(64) if b != 5])
    usual = flat(module(x))
    cpu_precision(precision)
    may_differ = terms((64, 130, 9, 64), precision) > 1
    for got, wanted in zip(flat(module(x)), usual, strict=True):
        if may_differ:
            assert got.isnan()[wanted.isnan()].all()
            got, wanted = (result.index_select(1, others) for result in (got, wanted))
        assert torch.equal(got.isnan(), wanted.isnan())


@pytest.mark.parametrize("cell", CELLS)
def test_compile_follows_the_precision_setting_and_export_keeps_it(cell, cpu_precision):
    module, x = FUSED[cell](64, 130).requires_grad_(False), torch.randn(9, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    eager, programs = {}, {}
    for precision in ("highest", *LOWER, "highest"):
        cpu_precision(precision)
        eager[precision] = flat(module(x))
        assert all_equal(flat(compiled(x)), eager[precision])
        programs[precision] = torch.export.export(module, (x,)).module()
    for precision, program in programs.items():
        assert all_equal(flat(program(x)), eager[precision])


@pytest.mark.parametrize("cell", CELLS)
def test_explain_names_the_precision_setting(cell, cpu_precision):
    module, x = FUSED[cell](64, 130), torch.randn(9, 64, 64)
    name = "rnn" if cell == "lstm" else "matmul"
    for precision in LOWER:
        value = SETTINGS[precision]
        cpu_precision(precision)
        explained = explain(module, x)
        if terms((64, 130, 9, 64), precision):
            assert explained.path == f"cpu {ops.cpu_kernel(torch.bfloat16)}"
            setting = f"torch.backends.mkldnn.{name}.fp32_precision"
            assert explained.why_not["float32 products"] == f"{setting} is '{value}'"
        else:
            assert explained.path == f"cpu {ops.cpu_kernel()}"
            assert "no instructions" in explained.why_not["bfloat16 products"]


def test_explain_says_why_small_and_invariant_calls_use_float32_products(cpu_precision):
    if not terms((64, 130, 9, 64), "medium"):
        pytest.skip("this processor has no instructions for pairs of bfloat16")
    cpu_precision("high")
    small = explain(FUSED["rnn"](64, 130), torch.randn(2, 8, 64))
    assert small.why_not["bfloat16 products"] == "they would not be faster for this size"
    invariant = explain(FUSED["rnn"](64, 130, batch_invariant=True), torch.randn(9, 64, 64))
    assert "batch_invariant" in invariant.why_not["bfloat16 products"]
