"""The Triton functions that printed kernels call: math, rows of a layout, and products."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def half_expm1(a):
    """Returns expm1(2 a) / 2 for |a| <= 44, as csrc/kernel/math/nonlinearities.h computes it."""
    shifted = a * 2.885390043258667 + 12582912.0  # 2 / ln 2; adding 1.5 * 2**23 rounds to integer
    n = shifted - 12582912.0
    s = tl.fma(n, -0.3465735912322998, a)  # ln 2 / 2, in so few bits that the product is exact
    c = tl.fma(s, 0.0446286706909, 0.133865452122)
    c = tl.fma(s, c, 0.333330255182)
    c = tl.fma(s, c, 0.666661717641)
    c = tl.fma(s, c, 1.00000001239)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    power = exponent.to(tl.float32, bitcast=True)  # 2**n
    return tl.fma(power, tl.fma(c, s * s, s), 0.5 * power - 0.5)


@triton.jit
def tanh(x):
    a = tl.abs(x)
    e = half_expm1(tl.where(a > 10.0, 10.0, a))  # unlike a minimum, where keeps NaN
    reciprocal = 1.0 / (e + 1)
    y = e * reciprocal
    y = tl.fma(tl.fma(-y, e + 1, e), reciprocal, y)  # corrects the error of the division
    return tl.where(x < 0, -y, y)


@triton.jit
def expm1(x):
    small = 2.0 * half_expm1(0.5 * tl.where(tl.abs(x) > 80.0, 0.0, x))
    return tl.where(x < -80.0, -1.0, tl.where(tl.abs(x) <= 80.0, small, tl.exp(x)))


@triton.jit
def log1p(x):
    u = 1.0 + x
    y = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == INFINITY, u, y))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def sequences(b, lengths, offsets, T, B, N, batch_stride):
    """Returns the number of steps and the first row of each sequence b.

    The host does not read lengths and offsets, so they are clamped to the bounds of the tensors.
    """
    mask = b < B
    if offsets is not None:
        first = tl.load(offsets + b, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), N)
        length = tl.load(offsets + b + 1, mask=mask, other=0) - first
        length = tl.minimum(tl.maximum(length, 0), N - first)
    else:
        first = b * batch_stride
        if lengths is not None:
            length = tl.minimum(tl.maximum(tl.load(lengths + b, mask=mask, other=0), 0), T)
        else:
            length = tl.where(mask, T, 0).to(tl.int64)
    return length, first


@triton.jit
def row_at(t, first, starts, time_stride, mask):
    """Returns each sequence's row at its time t. `mask` says which times exist."""
    if starts is not None:
        row = first + tl.load(starts + t, mask=mask, other=0)
    else:
        row = first + t * time_stride
    return row


@triton.jit
def is_cut(t, direction, reset, b, length, reset_time_stride, reset_batch_stride):
    """Returns whether a reset cuts the step at time t off from the previous state."""
    if reset is None:
        cut = length < 0
    else:
        # The second direction reaches time t from t + 1, across the border of step t + 1.
        border = t + direction
        place = border * reset_time_stride + b * reset_batch_stride
        cut = tl.load(reset + place, mask=(border >= 0) & (border < length), other=0) != 0
    return cut


@triton.jit
def previous(history, hx, reset_to, place, place_hx, place_reset_to, goes_on, starts, cut):
    """Loads previous states: from the history, from hx at the first step, or from reset_to.

    The three masks exclude each other. A state is zero where its tensor is None.
    """
    value = tl.load(history + place, mask=goes_on, other=0.0)
    if hx is not None:
        value = tl.where(starts, tl.load(hx + place_hx, mask=starts, other=0.0), value)
    if reset_to is not None:
        value = tl.where(cut, tl.load(reset_to + place_reset_to, mask=cut, other=0.0), value)
    return value


@triton.jit
def add_product(
    sum, left, right, columns, SOME: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns sum + left @ right, in float32; of `columns` only if `SOME`. `DOT` needs 16 rows."""
    if DOT:
        total = tl.dot(left, right, sum, input_precision=PRECISION)
    else:
        products = left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :]
        total = sum + tl.sum(products, axis=1)
    if SOME:
        total = tl.where(columns, total, sum)
    return total


@triton.jit
def heads_from(start, HEAD: tl.constexpr):
    """Returns the first unit of the head of unit `start`."""
    return start // HEAD * HEAD


@triton.jit
def heads_to(start, BLOCK: tl.constexpr, HEAD: tl.constexpr, H: tl.constexpr):
    """Returns the end of the head of the last unit of a block that begins at unit `start`."""
    return tl.minimum((start + BLOCK - 1) // HEAD * HEAD + HEAD, H)
