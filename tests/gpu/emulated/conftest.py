"""Fixtures that run PTX in the emulator in tools/ptx. `test_triton.py` starts these tests."""

import os

import pytest

from tools.ptx import driver

if os.environ.get("NAMERNN_FAST_EMULATE") != "1":
    raise RuntimeError("set the environment variable NAMERNN_FAST_EMULATE=1")


@pytest.fixture(scope="session")
def _machine():
    return driver.install()


@pytest.fixture
def machine(_machine):
    """Provides the emulated GPU, initially an A100. The test fails if it detects a fault."""
    _machine.device = driver.DEVICES[80]
    _machine.options = driver.Options()
    _machine.faults.clear()
    yield _machine
    assert not _machine.faults, "\n".join(map(str, _machine.faults))


@pytest.fixture(autouse=True)
def _ieee_by_default(fp32_precision):
    """Disables TF32 unless a test enables it."""
