"""Checks the oracle, and checks the paths without a kernel against the oracle."""

import numpy as np
import oracle
import pytest
import torch
from cases import LAYOUTS, TORCH, Case
from kinds import VARIANTS

from namernn_fast.cells import CELLS
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget


@pytest.mark.parametrize("cell", oracle.EQUATIONS)
def test_handwritten_gradients_match_finite_differences(cell):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3)).astype(np.longdouble)
    hidden_size = 3 if cell == "projected" else 2
    size = 2 + hidden_size * (oracle.EQUATIONS[cell].parts - 1)
    hx = rng.standard_normal((2, 1, size)).astype(np.longdouble)
    rows = hidden_size * (VARIANTS[cell].gates if cell in VARIANTS else 1)
    has_rate = oracle.EQUATIONS[cell].has_rate
    more = [(2, 3)] if hidden_size > 2 else [(rows,)] if has_rate else []
    shapes = [(rows, 3), (rows, 2), (rows,), (rows,), *more] * 2
    weights = [rng.standard_normal(shape).astype(np.longdouble) for shape in shapes]
    grad_output = rng.standard_normal((4, 4))
    grad_h_n = rng.standard_normal((2, 1, size))
    noise = [rng.standard_normal((4, 4)).astype(np.longdouble)] if has_rate else None

    def loss():
        outputs, h_n, _ = oracle.rnn([x], hx, weights, cell, True, noise=noise)
        return (outputs[0] * grad_output).sum() + (h_n * grad_h_n).sum()

    _, _, tape = oracle.rnn([x], hx, weights, cell, True, noise=noise)
    (grad_x,), grad_hx, grad_weights, grad_noise = oracle.rnn_backward(
        tape, hx, weights, cell, True, [grad_output], grad_h_n
    )
    step = np.longdouble(2) ** -20
    arrays, grads = [x, hx, *weights, *(noise or [])], [grad_x, grad_hx, *grad_weights]
    for array, grad in zip(arrays, grads + (grad_noise if has_rate else []), strict=True):
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + step
            above = loss()
            array[index] = value - step
            below = loss()
            array[index] = value
            difference = (above - below) / (2 * step)
            # The truncation error of a central difference grows with step**2.
            assert abs(difference - grad[index]) < 1000 * step**2 * max(1, abs(difference))


@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_sigmoid_has_a_small_relative_error(dtype):
    x = np.arange(-700, 700, 7).astype(dtype)
    quotients = oracle.sigmoid(x) / oracle.sigmoid(-x)
    assert np.abs(quotients / np.exp(x) - 1).max() < 8 * np.finfo(dtype).eps
    assert np.abs(oracle.sigmoid(x) + oracle.sigmoid(-x) - 1).max() < 2 * np.finfo(dtype).eps
    assert [*oracle.sigmoid(np.array([-np.inf, np.inf], dtype))] == [0, 1]
    assert np.isnan(oracle.sigmoid(np.array([np.nan], dtype))).all()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracle_agrees_with_torch(layout, cell):
    """In float64 the oracle and torch differ only by rounding, so they interpret options alike."""
    case = Case(3, 5, 6, 4, {"num_layers": 2, "bidirectional": True}, layout, cell=cell)
    theirs = case.run(TORCH[cell], torch.float64)
    single = case.run(TORCH[cell], torch.float32)
    for name, exact in case.run_oracle(torch.float64).items():
        # Rounding errors in float64 are nine digits smaller than in float32.
        error = np.abs(theirs[name].numpy() - exact).max()
        assert error < 1e-6 * np.abs(single[name].numpy() - exact).max()


@pytest.fixture(
    params=[
        *(f"{name} in torch's operator" for name, cell in CELLS.items() if cell.torch_operator),
        *(f"{name} in ATen operators" for name in CELLS),
    ]
)
def cell(request, monkeypatch):
    """Forces a path without a kernel, and returns the cell to run on that path."""
    monkeypatch.setattr(availability, "why_not_cpu_kernel", lambda input: "a test")
    name, _, path = request.param.split(maxsplit=2)
    if path == "ATen operators":
        monkeypatch.setattr("namernn_fast.torch_operators.why_not", lambda *arguments: "a test")
    return name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_paths_without_a_kernel_keep_the_budget(layout, dtype, cell):
    """The reference and torch's own operator keep the kernel's error budget."""
    budget = ErrorBudget(dtype)
    for seed in range(3):
        options = {"num_layers": 2, "bidirectional": seed > 0, "batch_first": seed > 1}
        Case(5, 9, 6, 4, options, layout, seed=seed, cell=cell).add_to(budget, dtype)
    budget.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paths_without_a_kernel_keep_the_16_bit_budget(dtype, cell):
    """In 16 bits, paths without a kernel are about as accurate as torch's layer in 16 bits."""
    budget = ErrorBudget(dtype)
    for seed in range(4):
        Case(6, 10, 5, 3, {"bidirectional": True}, seed=seed, cell=cell).add_to(budget, dtype)
    budget.check()
