"""Tests against float64 that TF32 layers are as accurate as products of rounded operands."""

import pytest
import torch
import triton
import triton.language as tl
from plans import PLANS
from tf32 import RoundedRecurrence, check_results
from torch.nn.functional import linear

from namernn_fast.gpu import layer
from namernn_fast.gpu.kernels import recurrent_product


@pytest.mark.covering(0)
@pytest.mark.parametrize("plan", [name for name in PLANS if "one_sequence" not in name])
@pytest.mark.parametrize("hidden_size", [33, 130])
def test_operands_are_rounded_to_the_nearest_value(plan, hidden_size, monkeypatch):
    """Truncating operands, as tensor cores do, would make errors nearly three times as large."""
    choose = PLANS[plan](hidden_size)._replace(precision="tf32")
    monkeypatch.setattr(layer, "plan_of", lambda *_: choose)
    check_results(plan, 3, hidden_size, 17, linear, RoundedRecurrence.apply)


@triton.jit
def _operand_kernel(x, y, BLOCK: tl.constexpr, FORM: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, recurrent_product._operand(tl.load(x + at), FORM))


def test_every_kind_of_number_is_rounded_correctly():
    """NaN, infinity and numbers that would overflow are unchanged. CUDA's NaN is 0x7FFFFFFF."""
    plan = PLANS["resident"](16)._replace(precision="tf32")
    form = layer.form_of(plan, 16, 1, tanh=True, padded=False)
    numbers = torch.randint(-(2**31), 2**31, (2**14,), generator=torch.Generator().manual_seed(0))
    special = [0, -(2**31), 1, 0xFFF, 0x1000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]
    numbers[: len(special)] = torch.tensor(special)
    x = numbers.to(torch.int32).view(torch.float32)
    y = torch.empty_like(x)
    _operand_kernel[(1,)](x, y, len(x), form)
    large = x.abs() >= 3.4e38
    assert torch.equal(y[large], x[large])
    assert torch.equal(y.isnan(), x.isnan())
    x, y = x[x.abs() < 3.4e38], y[x.abs() < 3.4e38]
    assert (y.view(torch.int32) & 0x1FFF).eq(0).all()
    unit = torch.exp2(torch.frexp(x.double()).exponent.double().clamp(-125) - 11)
    assert ((y.double() - x.double()).abs() <= unit / 2).all()
