"""Tests the benchmark of whole applications with applications that only return a loss."""

import pytest

from benchmarks.cpu.applications import Application, measure, report
from namernn_fast.testing import BudgetError


def application(*losses):
    """Returns an application whose programs `before` and `after` return these losses."""
    return Application("tagger", "an epoch", *(lambda loss=loss: lambda: loss for loss in losses))


def test_a_row_records_every_round_of_both_programs():
    row = measure(application(2.0, 2.001), seconds=0.0)
    assert len(row["before"]) == len(row["after"]) == 3
    assert row["losses"] == {"before": 2.0, "after": 2.001}


def test_an_application_whose_losses_differ_is_not_timed():
    with pytest.raises(BudgetError, match="the losses differ"):
        measure(application(2.0, 2.01), seconds=0.0)


def test_the_table_shows_medians_and_their_ratio():
    row = {"name": "tagger", "timed": "an epoch", "before": [3.0, 9.0, 4.0], "after": [1.0] * 3}
    *_, last = report({"cpu": "a CPU", "threads": 2, "rows": [row]}).splitlines()
    entries = [entry.strip() for entry in last.strip("|").split("|")]
    assert entries[:5] == ["tagger", "an epoch", "4.00 s", "1.00 s", "4.00×"]
