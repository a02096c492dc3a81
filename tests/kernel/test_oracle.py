"""Checks the oracle against `nn.RNN` and finite differences, and the reference path against it."""

import numpy as np
import oracle
import pytest
import torch
from cases import LAYOUTS, Case

from namernn_fast import FusedRNN
from namernn_fast.testing import ErrorBudget


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_hand_written_gradients_are_those_of_finite_differences(nonlinearity):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3)).astype(np.longdouble)
    hx = rng.standard_normal((2, 1, 2)).astype(np.longdouble)
    shapes = [(2, 3), (2, 2), (2,), (2,)] * 2
    weights = [rng.standard_normal(shape).astype(np.longdouble) for shape in shapes]
    grad_output = rng.standard_normal((4, 4))
    grad_h_n = rng.standard_normal((2, 1, 2))

    def loss():
        outputs, h_n, _ = oracle.rnn([x], hx, weights, nonlinearity, True)
        return (outputs[0] * grad_output).sum() + (h_n * grad_h_n).sum()

    _, _, tape = oracle.rnn([x], hx, weights, nonlinearity, True)
    (grad_x,), grad_hx, grad_weights = oracle.rnn_backward(
        tape, hx, weights, nonlinearity, True, [grad_output], grad_h_n
    )
    step = np.longdouble(2) ** -20
    for array, grad in zip((x, hx, *weights), (grad_x, grad_hx, *grad_weights), strict=True):
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nn_rnn_agrees(layout):
    """In float64 the oracle and `nn.RNN` differ only by rounding: they interpret options alike."""
    case = Case(3, 5, 6, 4, {"num_layers": 2, "bidirectional": True}, layout)
    theirs = case.run(torch.nn.RNN, torch.float64)
    single = case.run(torch.nn.RNN, torch.float32)
    for name, exact in case.run_oracle(torch.float64).items():
        # Rounding errors in float64 and in float32 are nine digits apart.
        error = np.abs(theirs[name].numpy() - exact).max()
        assert error < 1e-6 * np.abs(single[name].numpy() - exact).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_path(layout, dtype, monkeypatch):
    """The reference path, forced here, keeps the kernel's budget."""
    monkeypatch.setattr("namernn_fast.availability.why_not_cpu_kernel", lambda input: "a test")
    budget = ErrorBudget(dtype)
    for seed in range(3):
        options = {"num_layers": 2, "bidirectional": seed > 0, "batch_first": seed > 1}
        Case(5, 9, 6, 4, options, layout, seed=seed).add_to(budget, FusedRNN, dtype)
    budget.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_path_in_half_precision(dtype, monkeypatch):
    """The reference path in 16 bits is judged by `nn.RNN` in 16 bits and the oracle."""
    monkeypatch.setattr("namernn_fast.availability.why_not_cpu_kernel", lambda input: "a test")
    budget = ErrorBudget(dtype)
    for seed in range(4):
        Case(6, 10, 5, 3, {"bidirectional": True}, seed=seed).add_to(budget, FusedRNN, dtype)
    budget.check()
