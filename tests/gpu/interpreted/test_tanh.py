"""Tests the accuracy of the GPU kernels' tanh, with a division as inaccurate as a GPU's."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from namernn_fast.gpu.kernels import primitives


@triton.jit
def _tanh_kernel(x, y, BLOCK: tl.constexpr, IMPROVE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, primitives.tanh(tl.load(x + at), IMPROVE))


def tanh(x, improve=True):
    y = torch.empty_like(x)
    _tanh_kernel[(1,)](x, y, BLOCK=len(x), IMPROVE=improve)
    return y


@pytest.mark.parametrize("off", [0, -2, 2])
@pytest.mark.parametrize(("improve", "units"), [(True, 2.5), (False, 5.5)])
def test_the_error_of_tanh_stays_within_its_bound(improve, units, off, monkeypatch):
    """The error is at most `units` ulp over the whole range.

    The emulated division errs by up to 2 ulp, as PTX allows for `div.full`. The kernel must not use
    `exp2`, whose accuracy is not guaranteed.
    """

    def divide(self, left, right):
        exact = np.divide(left.data, right.data)
        return interpreter.TensorHandle((exact.view(np.int32) + off).view(np.float32), left.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_exp2")
    bits = torch.arange(8, 0x41300000, 0x41300000 >> 17)[: 2**17]  # bits of numbers up to 11
    x = bits.to(torch.int32).view(torch.float32)
    exact = x.double().tanh()
    unit = torch.exp2(torch.frexp(exact.float()).exponent.double().clamp(-125) - 24)
    assert ((tanh(x, improve) - exact).abs() <= units * unit).all()
    assert torch.equal(tanh(-x, improve), -tanh(x, improve))


@pytest.mark.parametrize("improve", [True, False])
def test_tanh_saturates_and_keeps_signed_zeros_and_nan(improve):
    large = torch.tensor([11.0, 1e4, 3.4e38, torch.inf] * 4)
    assert tanh(large, improve).eq(1).all()
    zeros = torch.tensor([0.0, -0.0] * 8)
    assert torch.equal(tanh(zeros, improve).signbit(), zeros.signbit())
    assert tanh(zeros, improve).eq(0).all()
    not_a_number = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -0x400000] * 4, dtype=torch.int32)
    assert tanh(not_a_number.view(torch.float32), improve).isnan().all()
