"""Tests that the kernels round operands to the nearest TF32 value."""

import torch
import triton
import triton.language as tl
from plans import resident

from namernn_fast.gpu import layer
from namernn_fast.gpu.kernels import recurrent_product


@triton.jit
def _operand_kernel(x, y, BLOCK: tl.constexpr, FORM: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, recurrent_product._operand(tl.load(x + at), FORM))


def test_kernels_round_every_kind_of_number_to_the_nearest_tf32_value():
    """NaN, infinity and numbers that would overflow stay unchanged. CUDA's NaN is 0x7FFFFFFF."""
    plan = resident(16)._replace(precision="tf32")
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
