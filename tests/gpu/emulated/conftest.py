"""Tests that execute the PTX of the GPU kernels, by tools/ptx; `test_triton.py` starts them."""

import os

import pytest
import torch

from tools.ptx import driver

if os.environ.get("NAMERNN_FAST_EMULATE") != "1":
    raise RuntimeError("set NAMERNN_FAST_EMULATE=1")


@pytest.fixture(scope="session")
def _machine():
    return driver.install()


@pytest.fixture
def machine(_machine):
    """The machine, initially an A100. Fails the test if it finds a fault."""
    _machine.device = driver.DEVICES[80]
    _machine.options = driver.Options()
    _machine.faults.clear()
    yield _machine
    assert not _machine.faults, "\n".join(map(str, _machine.faults))


@pytest.fixture(autouse=True)
def fp32_precision():
    """Sets the precision of RNNs and of torch's products for one test; IEEE by default."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def set_flags(of_rnn, of_matmul):
        rnn.fp32_precision, matmul.fp32_precision = of_rnn, of_matmul

    set_flags("ieee", "ieee")
    yield set_flags
    set_flags(*before)
