"""The GPU for which plans are made in these tests; Triton is imported where it is needed."""

import pytest
import torch


@pytest.fixture
def nothing_tuned():
    """No plan from `autotune`, before one test and after it."""
    from namernn_fast.gpu import plan

    plan.tuned.clear()
    yield
    plan.tuned.clear()


@pytest.fixture
def h100(monkeypatch, nothing_tuned):
    """An H100 that has refused no launch yet, as far as plans depend on it."""
    from benchmarks.gpu.resources import H100
    from namernn_fast.gpu import device

    monkeypatch.setattr(device, "find_device", lambda index: H100)
    monkeypatch.setattr(device, "_refusing", set())


@pytest.fixture
def fp32_precision():
    """Sets the precision of RNNs and of torch's products for one test; IEEE for both by default."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def set_flags(of_rnn, of_matmul):
        rnn.fp32_precision, matmul.fp32_precision = of_rnn, of_matmul

    set_flags("ieee", "ieee")
    yield set_flags
    set_flags(*before)
