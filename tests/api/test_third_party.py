"""Tests the program that runs other libraries' tests with fused layers and reports failures."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "third_party"
# The tests of an imaginary library that uses torch's layers.
TESTS = """
import pytest
import torch
from torch.nn import LSTM, RNN, LSTMCell, RNNCell

class Own(torch.nn.RNN):
    pass

@pytest.mark.parametrize("name", ["RNN", "LSTMCell"])
def test_class(name):
    cls = getattr(torch.nn, name)
    layer = cls(3, 4)
    assert type(layer) is cls is getattr(torch.nn.modules.rnn, name)
    assert isinstance(layer, (RNN, LSTMCell))
    assert isinstance(Own(3, 4), torch.nn.RNN)
    assert isinstance(Own(3, 4), torch.nn.modules.rnn.RNNBase)
    assert not isinstance(torch.nn.GRU(3, 4), (RNN, RNNCell, LSTM))

def test_whose_class():
    assert type(RNN(3, 4)).__module__.startswith("torch"), "a fused layer"

def test_skipped():
    RNN(3, 4)
    pytest.skip("no reason")

def test_without_a_layer():
    torch.nn.Linear(3, 4)
"""


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("report")


def run_pytest(folder, *options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FOLDER, *sys.path]))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_plugin_replaces_torchs_classes_with_fused_classes(tmp_path, report):
    (tmp_path / "test_library.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    outcomes, only = {}, []
    for layer in report.LAYERS:
        written = tmp_path / f"{layer}.json"
        options = ("-p", "layer_plugin", "--layers", layer, "--outcomes", written)
        ran = run_pytest(tmp_path, *options, *only)
        assert written.exists(), ran.stdout + ran.stderr
        only = ["--only-tests-of", written]
        outcomes[layer] = json.loads(written.read_text())
    assert "1 deselected" in ran.stdout
    shown = {
        layer: {test.partition("::")[2]: record["outcome"] for test, record in ran.items()}
        for layer, ran in outcomes.items()
    }
    passed = {"test_class[RNN]": "passed", "test_class[LSTMCell]": "passed"}
    passed["test_skipped"] = "skipped"
    assert shown["torch"] == {**passed, "test_whose_class": "passed"}
    assert shown["fused"] == {**passed, "test_whose_class": "failed"}

    result = report.Result(report.Suite("library", "1.0", ()), outcomes)
    (error,) = result.failing_here_alone().values()
    assert error.startswith("AssertionError: a fused layer")
    text = report.text_of([result], "2.0")
    assert "| library | 1.0 | 4 | 3 / 0 / 1 | 2 / 1 / 1 |" in text
    assert "`test_library.py::test_whose_class`: `AssertionError: a fused layer" in text


def test_a_test_that_stops_running_counts_as_failed(report):
    outcome = {"outcome": "passed", "error": ""}
    result = report.Result(
        report.Suite("library", "1.0", ()),
        {"torch": {"kept": outcome, "lost": outcome}, "fused": {"kept": outcome}},
    )
    assert result.failing_here_alone() == {"lost": report.NO_LONGER}
