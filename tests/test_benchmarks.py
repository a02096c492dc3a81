"""The benchmarks' own arithmetic, and that peers are checked before they are timed."""

import numpy as np
import pytest
import torch

from benchmarks.cpu import peers, roofline
from benchmarks.harness.grid import DENSE, FORWARD, MODES, PACKED, TRAINING, Cell
from benchmarks.harness.pages import write_section
from namernn_fast.testing import BudgetError, ErrorBudget


@pytest.mark.parametrize("mode", MODES)
def test_the_calls_of_a_cell_agree_with_the_oracle(mode):
    found = peers.calls(Cell(DENSE, mode, 3, 4, 5, 6), 1, ["PyTorch in place", "NumPy"])
    assert ("NumPy" in found) == (mode == FORWARD)
    assert set(peers.calls(Cell(PACKED, mode, 3, 4, 5, 12), 1, [])) == {"nn.RNN", "FusedRNN"}


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    def wrong(problem, threads):
        return lambda: torch.zeros(problem.cell.batch, problem.cell.hidden_size)

    monkeypatch.setitem(peers.RIVALS, "NumPy", ("numpy", wrong))
    with pytest.raises(BudgetError, match="NumPy is off by 1"):
        peers.calls(Cell(DENSE, FORWARD, 3, 4, 5, 6), 1, ["NumPy"])


def test_a_budget_counts_what_nudges_do():
    """The root mean square over samples of the largest distance over draws."""
    exact, ours = np.zeros(2), torch.tensor([0.0, 6.0], dtype=torch.float64)
    budget = ErrorBudget(ours.dtype)
    budget.add("h", ours, torch.zeros_like(ours), exact)
    for sample, distance in [(0, 1.0), (0, 0.5), (1, 2.0)]:
        budget.add_nearby("h", sample, exact + np.array([0, distance]), exact)
    with pytest.raises(BudgetError, match=r"h: error 6 exceeds its budget 3\.16"):
        budget.check()
    budget.add_nearby("h", 2, exact - 5, exact)
    budget.check()


def test_flops_are_those_of_the_formula():
    size, hidden, steps, batch = 3, 5, 4, 2
    count = 0
    for t in range(steps):
        count += batch * hidden * size  # x_t W_ih
        if t:
            count += batch * hidden * hidden  # h_{t-1} W_hh
    assert roofline.flops(Cell(DENSE, FORWARD, batch, size, hidden, steps)) == 2 * count
    for t in range(steps):
        count += batch * hidden * size  # dz^T x
        if t:
            count += 2 * batch * hidden * hidden  # dz W_hh, dz^T h_{t-1}
    assert roofline.flops(Cell(DENSE, TRAINING, batch, size, hidden, steps)) == 2 * count


def test_a_section_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n")
    write_section(page, "one", "new")
    assert page.read_text() == "a\n<!-- one: begin -->\nnew\n<!-- one: end -->\nb\n"
    with pytest.raises(SystemExit, match=r"page\.md has no section between"):
        write_section(page, "two", "new")
    assert "new" in page.read_text()


def test_results_of_a_call():
    cell = Cell(DENSE, FORWARD, 2, 1, 3, 1)
    got = peers.results(cell, lambda: torch.ones(1, 2, 3))
    assert torch.equal(got["h_n"], torch.ones(2, 3))
