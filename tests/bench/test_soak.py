"""Tests the benchmark of long runs."""

from unittest.mock import Mock

import pytest
import torch

from benchmarks.cpu import soak


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
