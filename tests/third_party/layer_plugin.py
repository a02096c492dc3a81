"""A pytest plugin that replaces torch's layers with fused layers and records test outcomes.

`pytest -p layer_plugin --layers fused --outcomes FILE` replaces torch's recurrent layers and cells
with the fused classes before pytest imports any test file or library under test. `--layers torch`
changes nothing. The plugin writes the outcome of every test that creates a recurrent layer or cell
to FILE. It ignores all other tests.
"""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.modules import rnn

NAMESPACES = (torch.nn, torch.nn.modules, rnn)
NAMES = ("RNN", "RNNCell", "GRU", "GRUCell", "LSTM", "LSTMCell")
TORCH_CLASSES = {name: getattr(rnn, name) for name in NAMES}


def replace_classes() -> None:
    """Replaces the classes in torch.nn with the fused classes, which inherit from them."""
    import namernn_fast  # before the names are bound to the fused classes

    for namespace in NAMESPACES:
        for name in TORCH_CLASSES:
            setattr(namespace, name, getattr(namernn_fast, f"Fused{name}"))


def first_line(longrepr) -> str:
    """Returns the first line of an error, without the source code in a doctest's report."""
    if crash := getattr(longrepr, "reprcrash", None):
        return crash.message.partition("\n")[0]
    lines = str(longrepr).splitlines() or [""]
    return next(
        (line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)), lines[-1]
    )


class Recorder:
    """Records the outcome of each test, and whether the test created a layer."""

    def __init__(self, outcomes: Path, only: Path | None):
        self.outcomes = outcomes
        self.only = set(json.loads(only.read_text())) if only else None
        self.current: str | None = None
        self.built: set[str] = set()
        self.results: dict[str, dict[str, str]] = {}

    def watch(self, cls: type) -> None:
        """Makes a class and its subclasses record the current test when an instance is created."""
        construct = cls.__init__

        @functools.wraps(construct)
        def constructor(module, *args, **kwargs):
            if self.current:
                self.built.add(self.current)
            construct(module, *args, **kwargs)

        cls.__init__ = constructor

    def pytest_collection_modifyitems(self, config, items):
        if self.only is not None:
            others = [item for item in items if item.nodeid not in self.only]
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if item.nodeid in self.only]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self.current = item.nodeid
        try:
            return (yield)
        finally:
            self.current = None

    def pytest_runtest_logreport(self, report):
        result = self.results.setdefault(report.nodeid, {"outcome": "passed", "error": ""})
        if report.failed:
            result.update(outcome="failed", error=first_line(report.longrepr))
        elif report.skipped and result["outcome"] == "passed":
            result["outcome"] = "skipped"

    def pytest_sessionfinish(self):
        chosen = self.built if self.only is None else self.only & self.results.keys()
        text = json.dumps({test: self.results[test] for test in sorted(chosen)}, indent=1)
        self.outcomes.write_text(text + "\n", encoding="utf-8")


def pytest_addoption(parser):
    group = parser.getgroup("layer")
    group.addoption("--layers", choices=("torch", "fused"), default="torch")
    group.addoption("--outcomes", type=Path, help="a JSON file of the tests that built a layer")
    group.addoption(
        "--only-tests-of", type=Path, help="run only the tests in this file of outcomes"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config):
    options = early_config.known_args_namespace
    if options.layers == "fused":
        replace_classes()
    if options.outcomes:
        recorder = Recorder(options.outcomes, options.only_tests_of)
        for cls in TORCH_CLASSES.values():
            recorder.watch(cls)
        early_config.pluginmanager.register(recorder, "layer-recorder")
