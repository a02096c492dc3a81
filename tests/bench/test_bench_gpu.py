"""Tests the GPU benchmark without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from torch import nn

pytest.importorskip("triton")

from benchmarks.gpu import contests, run
from benchmarks.harness.paths import ROOT, SCRATCH
from namernn_fast import FusedGRU
from namernn_fast.bench.race import QUICK
from namernn_fast.testing import BudgetError

GRU = contests.Contest("dense", "forward + backward", 3, 4, 5, 6, "gru", precision="float32")


@pytest.mark.slow
def test_the_dry_run_checks_every_kind_of_contest():
    command = ["make", "bench-gpu", "DRY_RUN=1", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    document = json.loads((SCRATCH / "gpu.json").read_text(encoding="utf-8"))
    kinds = {(case.group, case.cell, case.family, case.mode) for case in contests.CONTESTS}
    rows = document["rows"]
    assert {(row["group"], row["cell"], row["family"], row["mode"]) for row in rows} == kinds
    assert all(len(row["medians"]) >= 2 and contests.OURS in row["medians"] for row in rows)
    # Each contest calls our layer once to check it and again to time it.
    training = [row for row in rows if row["mode"] == GRU.mode]
    assert document["interpreted"]["forward"] >= 2 * len(rows)
    assert document["interpreted"]["backward"] >= 2 * len(training)


class Wrong(FusedGRU):
    def forward(self, x):
        output, h_n = super().forward(x)
        return output * 1.5, h_n


def fail():
    raise RuntimeError("out of something")


def install():
    import a_package_that_nobody_has  # noqa: F401


def measure(monkeypatch, ours, **rivals):
    makers = {contests.OURS: lambda: contests.OutputOf(ours(4, 5)), **rivals}
    entries = "nn.GRU", contests.OutputOf(nn.GRU(4, 5)), makers
    monkeypatch.setattr(run, "DRY", True)
    monkeypatch.setattr(run, "DEVICE", "cpu")
    monkeypatch.setattr(run, "entries", lambda contest, device: entries)
    return run.STUDY.measure(GRU, QUICK)


def test_rivals_that_are_wrong_or_missing_are_not_timed(monkeypatch):
    rivals = {"wrong": lambda: contests.OutputOf(Wrong(4, 5)), "failing": fail, "missing": install}
    row = measure(monkeypatch, FusedGRU, **rivals)
    assert row["medians"].keys() == {"nn.GRU", contests.OURS}
    assert row["absent"]["wrong"].startswith("wrong: wrong is off by")
    assert row["absent"] | {"wrong": ""} == {
        "wrong": "",
        "failing": "failed: out of something",
        "missing": "not installed",
    }
    row |= vars(GRU) | {"medians": {"nn.GRU": 1e-3, contests.OURS: 2e-3}}
    text = run.table([row])
    assert "0.50" in text
    assert "| failing | failed: out of something" in text


def test_a_wrong_layer_is_not_timed(monkeypatch):
    with pytest.raises(BudgetError, match="wrong: ours is off by"):
        measure(monkeypatch, Wrong)


def test_contests_after_the_deadline_are_listed():
    row = replace(run.STUDY, deadline=0).measure(contests.CONTESTS[0], QUICK)
    assert row["absent"] == {"nn.RNN": "out of time", contests.OURS: "out of time"}
    row |= vars(contests.CONTESTS[0])
    assert "out of time" in run.table([row])
