"""Tests the benchmarks of long runs and of many sequences."""

from unittest.mock import Mock

import pytest
import torch

from benchmarks.cpu import sessions, soak
from namernn_fast.bench.workloads import LAYERS_OF


@pytest.mark.slow
def test_a_soak_samples_memory_and_counts_calls():
    found = soak.measure(0.5)
    assert not found["wrong"]
    assert len(found["samples"]) == soak.SAMPLES
    assert found["samples"][-1]["calls"]
    text = soak.report({"cpu": "", "threads": 2, "samples": found["samples"]})
    assert f" {found['samples'][-1]['calls']:,} |" in text


@pytest.mark.parametrize("call", [lambda: torch.rand(9), Mock(side_effect=ValueError)])
def test_a_soak_stops_at_a_call_that_raises_or_gives_other_bits(call, monkeypatch):
    monkeypatch.setattr(soak, "CALLS", [lambda *_: call])
    assert soak.measure(6)["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", LAYERS_OF)
def test_sequences_step_one_at_a_time_or_together(cell, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(sessions, "SEQUENCES", 3)
    monkeypatch.setitem(sessions.METHODS, sessions.SESSIONS, lambda _: (Mock(), Mock()))
    row = sessions.measure(cell, 0.01)
    stream, together = row["by_name"][sessions.STREAM], row["by_name"][sessions.SESSIONS]["all"]
    assert stream["percentile"] >= stream["one"] > 0
    assert together > 0
    assert sessions.report({"cpu": "", "rows": [row]}).count(cell) == len(sessions.METHODS)
