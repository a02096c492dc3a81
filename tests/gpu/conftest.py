"""Fixtures for the GPU tests. Only the fixtures that need Triton import it."""

import pytest
import torch


@pytest.fixture
def h100(monkeypatch):
    """Makes the package choose plans for an H100, with no tuned plans and no rejected launches."""
    from benchmarks.gpu.dry_run import H100
    from namernn_fast.gpu import device, plan

    monkeypatch.setattr(device, "find_device", lambda index: H100)
    monkeypatch.setattr(device, "_refusing", set())
    plan.tuned.clear()
    yield
    plan.tuned.clear()


@pytest.fixture
def fp32_precision():
    """Disables TF32 in RNNs and torch.matmul. Provides a function that sets both precisions."""
    rnn, matmul = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = rnn.fp32_precision, matmul.fp32_precision

    def set_flags(rnn_precision, matmul_precision):
        rnn.fp32_precision, matmul.fp32_precision = rnn_precision, matmul_precision

    set_flags("ieee", "ieee")
    yield set_flags
    set_flags(*before)
