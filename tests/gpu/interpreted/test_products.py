"""Tests the kernel for matrix products around the recurrence, in Triton's interpreter."""

import operators
import pytest
import torch
from tf32 import nearest

from namernn_fast import ops
from namernn_fast.cells import VANILLA
from namernn_fast.gpu import kernels, launching, products

pytestmark = pytest.mark.covering(0)
RNN, MATMUL = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def launched(monkeypatch):
    """Provides a list to which each launch of `product_kernel` appends its precision."""
    precisions, run = [], launching.run

    def record(kernel, grid, arguments, settings):
        if kernel is kernels.product_kernel:
            precisions.append(arguments["PRECISION"])
        run(kernel, grid, arguments, settings)

    monkeypatch.setattr(launching, "run", record)
    return precisions


def test_nearest_rounds_to_the_nearest_tf32_value():
    ulp = 2.0**-10
    x = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + 0.49 * ulp, 1 + 0.51 * ulp])
    assert torch.equal(nearest(x) - 1, torch.tensor([1, 2, 0, 1]) * ulp)


def matrix(rows, columns, kind):
    """Returns a random matrix that is row-major, column-major or a view of every other column."""
    if kind == "columns":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, 2 * columns)[:, ::2] if kind == "apart" else torch.randn(rows, columns)


SIZES = [(1, 1, 1), (65, 3, 17), (5, 130, 33), (3, 7, 1500), (64, 64, 64)]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("storage", ["rows", "columns", "apart"])
@pytest.mark.parametrize("plus", [None, "bias", "column", "matrix", "out"])
def test_products_are_accurate_for_any_size_and_strides(
    precision, storage, plus, fp32_precision, launched
):
    """Only summation errors are allowed. Truncating operands would make them 1000 times larger."""
    fp32_precision(precision, "ieee" if precision == "tf32" else "tf32")
    for M, N, K in SIZES:
        left, right = matrix(M, K, storage), matrix(K, N, storage)
        added = {"bias": torch.randn(N), "column": torch.randn(M, 1)}
        added |= {"matrix": torch.randn(M, N), "out": torch.randn(M, N)}
        added = added.get(plus)
        operands = (left, right)
        if precision == "tf32":
            operands = [nearest(x) for x in operands]
        exact = operands[0].double() @ operands[1].double()
        magnitude = operands[0].abs().double() @ operands[1].abs().double()
        if added is not None:
            exact, magnitude = exact + added, magnitude + added.abs()
        found = products.product(left, right, added, added if plus == "out" else None)
        assert ((found - exact).abs() <= (2 + K**0.5) * EPS * magnitude).all()
        if plus == "out":
            assert found is added
    assert launched == [precision] * len(SIZES)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_products_preserve_infinity_nan_and_zero(precision, fp32_precision):
    fp32_precision(precision, "ieee" if precision == "tf32" else "tf32")
    odd = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, 1e-45]
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).item()
    left = torch.tensor([*odd, payload])[:, None]
    found = products.product(left, torch.ones(1, 3))
    kept = left.expand(8, 3)[:5]
    torch.testing.assert_close(found[:5], kept, rtol=0, atol=0, equal_nan=True)
    assert found[7].isnan().all()


def test_the_kernel_for_64_bit_offsets_returns_the_same_bits(fp32_precision, monkeypatch):
    """The kernel for offsets of at least 2^31 must give the same bits when offsets are small."""
    fp32_precision("ieee", "tf32")
    left, right = torch.randn(65, 17), torch.randn(17, 3)
    near = products.product(left, right)
    run, wide = launching.run, []

    def run_wide(kernel, grid, arguments, settings):
        wide.append(arguments["WIDE"])
        run(kernel, grid, arguments | {"WIDE": True}, settings)

    monkeypatch.setattr(launching, "run", run_wide)
    assert torch.equal(products.product(left, right), near)
    far = left[:1].as_strided((1, 17), (2**31, 1))  # one row, so the stride needs no memory
    products.product(far, right)
    assert wide == [False, True]


def test_a_long_sum_is_split_among_programs():
    plan = products.choose(256, 128, 8192, "tf32", 132)
    assert plan.parts == 16
    assert (plan.parts - 1) * plan.terms < 8192 <= plan.parts * plan.terms
    for M, N, K in [*SIZES, (1, 1, 10**6), (4096, 4096, 10**5), (3, 3, 0)]:
        for precision in ("ieee", "tf32"):
            plan = products.choose(M, N, K, precision, 132)
            assert plan.terms % plan.tiles.block_k == 0
            assert (plan.parts - 1) * plan.terms < max(K, 1)
            assert plan.parts * plan.terms >= K
            assert plan.parts <= 132


WEIGHTS = [p.detach() for p in torch.nn.RNN(4, 20).parameters()]


def train():
    x, hx = torch.randn(3, 2, 4), torch.randn(1, 2, 20)
    call = (VANILLA.number, x, [hx], WEIGHTS, None, None, ops.BIAS | ops.WANT_SAVED, 0)
    output, (h_n,), saved = operators.forward(*call)
    grads = (torch.randn_like(output), [torch.randn_like(h_n)])
    return output, h_n, operators.backward(*call, output, saved, *grads, [True, True], [0])


@pytest.mark.parametrize("rnn", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("matmul", ["ieee", "tf32", "none"])
def test_all_products_use_the_precision_set_for_rnns(rnn, matmul, fp32_precision, launched):
    fp32_precision(rnn, matmul)
    flags = RNN.fp32_precision, MATMUL.fp32_precision
    train()
    # Training needs six products: the projection, the gradients of hx, input and weight_ih (one
    # each), and the gradient of weight_hh (two).
    wanted = "tf32" if rnn == "tf32" else "ieee"
    agree = wanted == ("tf32" if matmul == "tf32" else "ieee")
    assert launched == ([] if agree else [wanted] * 6)
    assert (RNN.fp32_precision, MATMUL.fp32_precision) == flags
