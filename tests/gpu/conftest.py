"""Fixtures of the GPU tests. Triton is imported only inside the fixtures that need it."""

import pytest
import torch


@pytest.fixture
def h100(monkeypatch):
    """Makes the package plan for an H100, without tuned plans and without refused launches."""
    from namernn_fast.gpu import device, plan
    from tools.gpu.resources import H100

    monkeypatch.setattr(device, "find_device", lambda index: H100)
    monkeypatch.setattr(device, "_refusing", set())
    plan.tuned.clear()
    yield
    plan.tuned.clear()


@pytest.fixture
def fp32_precision():
    """Sets RNNs and torch's products to IEEE; returns a function that sets other precisions."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def set_flags(rnn_precision, matmul_precision):
        rnn.fp32_precision, matmul.fp32_precision = rnn_precision, matmul_precision

    set_flags("ieee", "ieee")
    yield set_flags
    set_flags(*before)
