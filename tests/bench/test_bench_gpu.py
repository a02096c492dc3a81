"""Tests the benchmark of GPUs without a GPU."""

import pytest
import torch

from benchmarks.gpu import run
from benchmarks.harness.paths import ROOT
from namernn_fast.testing import BudgetError

pytest.importorskip("triton")
SIZES = (3, 2, 16)


def test_a_dry_run_checks_every_case(run_program, tmp_path):
    """The kernels run in Triton's interpreter."""
    printed = run_program("-m", "benchmarks.gpu.run", "--dry-run", cwd=ROOT)
    makers = run.torch_cases, run.reset_cases, run.equation_cases
    names = [f"{case.name} 3 2 16" for make in makers for case in make(SIZES, "cpu")]
    assert len(names) == 11
    assert printed.splitlines()[: len(names)] == names


def test_a_wrong_result_is_not_timed():
    (case, *_) = run.reset_cases(SIZES, "cpu")
    run.measure(case, "cpu", None)
    layer = case.ways[run.OURS]

    def wrong():
        module, _ = layer()
        return module, lambda x: module(2 * x)[0]

    case.ways[run.OURS] = wrong
    with pytest.raises(BudgetError, match="output"):
        run.measure(case, "cpu", None)


def test_the_table_has_every_way():
    row = {"case": "GRU", "sizes": SIZES, "milliseconds": {"a": 1.5}, "MiB": {"a": 2.0}}
    table = run.report([{**row, "not installed": ["b"]}])
    assert "| GRU | 3, 2, 16 | a | 1.5 | 2 |" in table
    assert "| GRU | 3, 2, 16 | b | not installed | |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_what_to_do(capsys):
    with pytest.raises(SystemExit):
        run.main([])
    assert "pass --dry-run" in capsys.readouterr().err
