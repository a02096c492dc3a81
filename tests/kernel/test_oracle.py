"""Checks the oracle, and checks the paths without a kernel against the oracle."""

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
def test_the_oracle_agrees_with_torch(layout, equation):
    """In float64 the results and gradients of the oracle and of torch differ only by rounding."""
    cell, options = layer_of(equation)
    options |= {"num_layers": 2, "bidirectional": True}
    case = Case(3, 5, 6, 4, options, layout, seed=1, cell=cell)  # odd seeds draw noise
    theirs = case.run(TORCH[cell], torch.float64)
    single = case.run(TORCH[cell], torch.float32)
    for name, exact in case.run_oracle(torch.float64).items():
        # Rounding errors in float64 are nine digits smaller than in float32.
        error = np.abs(theirs[name].numpy() - exact).max()
        assert error < 1e-6 * np.abs(single[name].numpy() - exact).max()


@pytest.fixture(
    params=[
        *(f"{name} in torch's operator" for name, cell in CELLS.items() if has_operator(cell)),
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paths_without_a_kernel_meet_the_budget(layout, dtype, cell):
    """The reference and torch's own operator meet the kernel's error budget, in 16 bits too."""
    budget = ErrorBudget(dtype)
    for seed in range(3):
        options = {"num_layers": 2, "bidirectional": seed > 0, "batch_first": seed > 1}
        options["bias"] = seed != 1
        Case(5, 9, 6, 4, options, layout, seed=seed, cell=cell).add_to(budget, dtype)
    budget.check()
