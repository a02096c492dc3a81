import os
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

from namernn_fast import availability

# The path of a socket has at most 107 characters: those of worker processes, in a temporary folder
# with a long path, cannot be made, and a DataLoader then waits for ever.
if len(tempfile.gettempdir()) > 40 and os.access("/tmp", os.W_OK):
    os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"

# These tests need a process whose Triton interprets: tests/gpu/test_triton.py starts one.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu/interpreted"]
if os.environ.get("NAMERNN_FAST_EMULATE") != "1":
    collect_ignore.append("gpu/emulated")

# Pytest shows the values in a failed `assert` of test files alone; tests/drawn.py asserts as well.
pytest.register_assert_rewrite("drawn")

# No example fails because the machine is busy.
TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", derandomize=True, **TIMELESS)
settings.register_profile("fuzz", max_examples=2500, print_blob=True, **TIMELESS)
settings.load_profile("test")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fills every `torch.empty` with NaN, so that a result that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Runs a test through the kernel and through ATen operators."""
    if request.param == "reference":
        monkeypatch.setattr(availability, "HAS_EXTENSION", False)
    elif not availability.HAS_EXTENSION:
        pytest.skip("the C++ extension was not built")
    return request.param


@pytest.fixture
def run_program():
    """Runs Python in a folder, with further environment variables, and returns what it prints."""

    def run(*arguments, cwd, **environment):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # which ends the processes it has started, as killing it would not
            raise
        assert process.returncode == 0, err
        return out

    return run


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
