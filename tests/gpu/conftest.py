"""The GPU that these tests plan for. Only fixtures that need Triton import it."""

import pytest
import torch


@pytest.fixture
def nothing_tuned():
    """Clears the plans of `autotune` before and after a test."""
    from namernn_fast.gpu import plan

    plan.tuned.clear()
    yield
    plan.tuned.clear()


@pytest.fixture
def h100(monkeypatch, nothing_tuned):
    """Makes plans for an H100 that has not refused a launch yet."""
    from namernn_fast.gpu import device
    from tools.gpu.resources import H100

    monkeypatch.setattr(device, "find_device", lambda index: H100)
    monkeypatch.setattr(device, "_refusing", set())


@pytest.fixture
def fp32_precision():
    """Sets the precision of RNNs and of torch's products for one test; IEEE for both by default."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def set_flags(rnn_precision, matmul_precision):
        rnn.fp32_precision, matmul.fp32_precision = rnn_precision, matmul_precision

    set_flags("ieee", "ieee")
    yield set_flags
    set_flags(*before)
