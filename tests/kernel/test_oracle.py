"""Compares torch's layers, and fused layers that do not use the kernel, with the oracle."""

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, LAYOUTS, TORCH, Case, layer_of

from namernn_fast.cells import CELLS
from namernn_fast.machine import availability
from namernn_fast.testing import ErrorBudget
from namernn_fast.torch_operators import has_operator


@pytest.mark.parametrize("equation", oracle.EQUATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracle_matches_torch_in_float64(layout, equation):
    """Results and gradients of the oracle and of torch differ only by rounding errors."""
    cell, options = layer_of(equation)
    options |= {"num_layers": 2, "bidirectional": True}
    case = Case(3, 5, 6, 4, options, layout, seed=1, cell=cell)  # odd seeds draw noise
    theirs = case.run(TORCH[cell], torch.float64)
    single = case.run(TORCH[cell], torch.float32)
    for name, exact in case.run_oracle(torch.float64).items():
        # Rounding errors in float64 are about 1e-9 times as large as in float32.
        error = np.abs(theirs[name].numpy() - exact).max()
        assert error < 1e-6 * np.abs(single[name].numpy() - exact).max()


@pytest.fixture(
    params=[
        *(f"{name} in torch's operator" for name, cell in CELLS.items() if has_operator(cell)),
        *(f"{name} in ATen operators" for name in CELLS),
    ]
)
def cell(request, monkeypatch):
    """Disables the kernel so that another path runs, and returns the cell to test."""
    monkeypatch.setattr(availability, "why_not_cpu_kernel", lambda input: "a test")
    name, _, path = request.param.split(maxsplit=2)
    if path == "ATen operators":
        monkeypatch.setattr("namernn_fast.torch_operators.why_not", lambda *arguments: "a test")
    return name


@pytest.mark.covering(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_without_the_kernel_meet_the_error_budget(layout, dtype, cell):
    """The reference path and torch's operator meet the same error budget as the kernel."""
    budget = ErrorBudget(dtype)
    for seed in range(3):
        options = {"num_layers": 2, "bidirectional": seed > 0, "batch_first": seed > 1}
        options["bias"] = seed != 1
        Case(5, 9, 6, 4, options, layout, seed=seed, cell=cell).add_to(budget, dtype)
    budget.check()
