"""Tests the benchmarks of whole programs with programs that only return a result."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks.cpu import applications
from benchmarks.harness.turns import Program
from namernn_fast.testing import BudgetError

STUDY = applications.STUDY


def program(*results, rtol=applications.LOSS_CHANGE, atol=0.0):
    """Returns a program whose versions `before` and `after` return these results."""
    makers = (lambda result=result: lambda: result for result in results)
    return Program("tagger", *makers, {"timed": "an epoch"}, rtol=rtol, atol=atol)


def test_a_row_records_every_round_of_both_versions():
    row = STUDY.measure_program(program(2.0, 2.001), seconds=0.0)
    assert [len(row["seconds"][role]) for role in ("before", "after")] == [3, 3]
    assert row["difference"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("wrong", "difference"),
    [
        (program(2.0, 2.01), "0.01"),
        (
            program(2.0, torch.full((3,), 2.001), rtol=0.0, atol=applications.VALUE_CHANGE),
            "0.001",
        ),
    ],
)
def test_a_program_whose_results_differ_is_not_timed(wrong, difference):
    with pytest.raises(BudgetError, match=f"the results differ by {difference}"):
        STUDY.measure_program(wrong, seconds=0.0)


def test_a_missing_package_and_a_wrong_program_do_not_stop_the_others(monkeypatch, capsys):
    right, wrong = program(2.0, 2.0), []
    others = [replace(right, package="not_installed"), program(2.0, 3.0), right]
    study = replace(STUDY, cases=others)
    rows = study.run(argparse.Namespace(threads=1, quick=True), wrong)
    assert [row["name"] for row in rows] == ["tagger"]
    assert wrong == ["tagger: the results differ by 1"]
    assert "not_installed is not installed" in capsys.readouterr().out


def test_the_table_shows_medians_and_their_ratio():
    row = {"name": "tagger", "timed": "an epoch", "medians": {"before": 4.0, "after": 1.0}}
    row |= {"spread": {"before": [3.0, 5.0]}}
    *_, last = STUDY.report({"cpu": "a CPU", "threads": [2], "rows": [row]}).splitlines()
    entries = [entry.strip() for entry in last.strip("|").split("|")]
    assert entries == ["tagger", "an epoch", "4.00 s", "1.00 s", "4.00×", "3.00 to 5.00"]
