"""Tests what the benchmark of pretrained models checks before timing, and what it reports."""

import argparse
import io
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.cases import __main__ as program
from benchmarks.cases import pages
from benchmarks.cases.case import (
    FUSED,
    INT8,
    PREPARED,
    QUANTIZED,
    STREAM,
    TORCH,
    Case,
    Stepping,
    best_of,
)
from benchmarks.cases.packages import ArraysOnly
from namernn_fast.bench.race import QUICK
from namernn_fast.testing import BudgetError


class Reader(Stepping):
    """A small model with a recurrent layer."""

    stepped = "rnn"

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 128), nn.Linear(128, 4)

    def step(self, x, state):
        output, state = self.rnn(x.unsqueeze(0), state)
        return output[0], state


def case(**changes) -> Case:
    """Returns a case with a small model. `changes` replaces fields of the case."""
    torch.manual_seed(0)
    x = torch.randn(6, 1, 8)

    def run(module, streamed=False):
        step = module.stepper(streamed)
        return module.head(torch.cat([step(frame) for frame in x]))

    fields = {"name": "six steps", "layer": "LSTM 128", "shape": "(1, 8)"}
    fields |= {"module": Reader(), "run": run, "decide": best_of, "streams": True}
    return Case(**fields | changes)


def test_a_case_times_every_kind_of_layer_and_keeps_the_model_unchanged():
    model = case()
    rows = program.times(model, {1, 2}, QUICK)
    assert type(model.module.rnn) is nn.LSTM
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert {TORCH, FUSED, PREPARED, STREAM} <= row["medians"].keys()
        assert 0 < row["share"] < 1
    assert rows[0]["changed"]["of"] == 6
    assert {rows[0]["changed"][name] for name in (FUSED, PREPARED, STREAM)} == {0}
    assert re.match(
        r"2 thread\(s\): torch [\d.]+ [µm]s, fused [\d.]+×, prepared ", program.line(rows[1])
    )


def test_wrong_scores_raise_an_error():
    model = case()
    calls = model.calls()
    with torch.no_grad(), pytest.raises(BudgetError, match="fused: error"):
        model.changed({**calls, FUSED: lambda: calls[TORCH]() + 1e-3})


def test_decisions_changed_by_int8_are_counted():
    model = case()
    calls = model.calls()
    with torch.no_grad():
        found = model.changed({**calls, INT8: lambda: -calls[TORCH]()})
        assert found == {"of": 6, FUSED: 0, PREPARED: 0, STREAM: 0, INT8: 6}
        assert case(decide=None).changed(calls) == {}


def quantizing() -> Case:
    """Returns a case with a module that `quantize_dynamic` replaces, and with streams."""
    return case(
        run=lambda module: module.head(module.rnn(torch.ones(6, 1, 8))[0]),
        streams=False,
        quantizes=True,
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantize_dynamic_is_timed_beside_int8():
    pytest.importorskip("torch.ao.quantization")
    rows = program.times(quantizing(), {1}, QUICK)
    (row,) = ({"package": "a package", "licence": "none", **row} for row in rows)
    names = {INT8, QUANTIZED} & row["medians"].keys()  # int8 only where it is fast
    assert QUANTIZED in names
    assert row["errors"].keys() == names
    assert all(0 < error < 0.1 for error in row["errors"].values())
    text = program.STUDY.report({"cpu": "a processor", "threads": [1], "rows": [row]})
    assert f"{QUANTIZED} {row['errors'][QUANTIZED]:.2%}" in text
    assert f"{QUANTIZED} {row['changed'][QUANTIZED]} of 6" in text


def test_quantize_dynamic_is_left_out_if_torch_has_none(monkeypatch):
    monkeypatch.setattr(torch.ao, "quantization", None)
    assert QUANTIZED not in quantizing().calls()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_networks_of_easyocr_agree_with_torchs_layers(monkeypatch, tmp_path):
    (tmp_path / "easyocr").mkdir()
    (tmp_path / "easyocr/config.py").write_text(
        "recognition_models = {'gen2': {'english_g2': {'characters': 'abc'}}}"
    )
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    found = {case.name: case for case in pages.easyocr()}
    assert len(found) == 6
    line = found["1 line"]
    with torch.inference_mode():
        calls = line.calls()
        assert calls[TORCH]().shape == (1, 159, 4)
        counts = line.changed({TORCH: calls[TORCH], FUSED: calls[FUSED]})
    assert counts == {"of": 159, FUSED: 0}


def test_recording_fails_if_a_package_is_missing(monkeypatch):
    for find in ("unpack", "version_of"):
        monkeypatch.setattr(program, find, lambda name: None)
    options = argparse.Namespace(quick=True, record=True, only=None, threads=1)
    with pytest.raises(SystemExit, match="Resemblyzer: left out"):
        program.STUDY.run(options, [])
    options.record = False
    assert program.STUDY.run(options, []) == []


def test_pickled_files_may_contain_only_arrays():
    arrays = {"weight": np.arange(6.0).reshape(2, 3)}
    loaded = ArraysOnly(io.BytesIO(pickle.dumps(arrays))).load()
    np.testing.assert_array_equal(loaded["weight"], arrays["weight"])
    with pytest.raises(pickle.UnpicklingError, match="is not part of an array"):
        ArraysOnly(io.BytesIO(pickle.dumps(print))).load()
