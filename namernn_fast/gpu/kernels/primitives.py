"""The building blocks of both passes: the rows of a program, loads, stores and the barrier."""

import triton
import triton.language as tl

from .arguments import Program, Step

# The grid is one-dimensional, because only its first axis may exceed 65,535 programs. Programs that
# share a block of sequences are its "members". They split the hidden units into tiles of BLOCK_N:
# member m has the tiles m, m + MEMBERS, ... The grid index varies fastest over members, then over
# directions, then over blocks. A program with one tile and one block of K keeps its part of
# weight_hh on chip across time. If it is also the only member, it keeps the state on chip as well.
# Otherwise each step stores the state in memory, and the next step reads it after a barrier.
#
# Steps are "earlier" or "later" in recurrence order, so in direction 1 the later step has the
# smaller time index. The forward pass computes the earlier step first, the backward pass the
# later step. "Previous" is used only for states: the previous state of a row is its h_{t-1}.
#
# The L1 cache may hold stale copies of rows that other programs write. Loads of these rows use .cg
# to bypass L1, but Triton drops this modifier if it turns a load into asynchronous copies of less
# than 16 bytes. So correctness relies only on the barrier, whose acquire invalidates L1.
#
# To find the variables that a loop changes, Triton compares their values before and after the loop
# body. If x is an alias of y before the loop, and the body sets x = y again, Triton treats x as
# constant. So a variable that a loop assigns must not be an alias or a field of a tuple before the
# loop.


@triton.jit
def tanh(x, IMPROVE: tl.constexpr):
    """Returns tanh x, within 2.5 ulp if IMPROVE is set. Keeps the sign of -0.

    Computes tanh |x| as e / (e + 1), where a polynomial gives e = expm1(2 |x|) / 2. The CPU kernel
    uses the same formula, in csrc/kernel/math/nonlinearities.h. The only approximate instruction is
    the division, with an error of up to 2 ulp; powers of two are built from their exponent bits.

    Args:
        IMPROVE: whether to correct the error of the division. 16-bit results do not need it.
    """
    a = tl.abs(x)
    a = tl.where(a > 10.0, 10.0, a)  # unlike a minimum, keeps NaN
    shifted = a * 2.885390043258667 + 12582912.0  # 2 / ln 2; adding 1.5 * 2**23 rounds to integer
    n = shifted - 12582912.0
    s = tl.fma(n, -0.3465735912322998, a)  # ln 2 / 2, in so few bits that the product is exact
    c = tl.fma(s, 0.0446286706909, 0.133865452122)
    c = tl.fma(s, c, 0.333330255182)
    c = tl.fma(s, c, 0.666661717641)
    c = tl.fma(s, c, 1.00000001239)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    power = exponent.to(tl.float32, bitcast=True)  # 2**n
    e = tl.fma(power, tl.fma(c, s * s, s), 0.5 * power - 0.5)
    if IMPROVE:
        reciprocal = 1.0 / (e + 1)
        y = e * reciprocal
        y = tl.fma(tl.fma(-y, e + 1, e), reciprocal, y)
    else:
        y = e / (e + 1)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (y.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def activation(z, dtype: tl.constexpr, FORM: tl.constexpr):
    """Applies the nonlinearity to float32 pre-activations z; returns the states in `dtype`."""
    # relu keeps NaN, as in torch.
    h = tanh(z, dtype == tl.float32) if FORM.TANH else tl.where(z <= 0, 0.0, z)
    return h.to(dtype)


@triton.jit
def activation_backward(grad, h, FORM: tl.constexpr):
    return grad * (1 - h * h) if FORM.TANH else tl.where(h <= 0, 0.0, grad)


@triton.jit
def _sequences(b, layout, T, B, N, batch_stride):
    """Returns the number of steps of each sequence [B] and its first row [B].

    The host does not check lengths and offsets that are on the device, so this function clamps the
    results to the bounds of the tensors.
    """
    mask = b < B
    if layout.offsets is not None:
        first = tl.load(layout.offsets + b, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), N)
        length = tl.load(layout.offsets + b + 1, mask=mask, other=0) - first
        return tl.minimum(tl.maximum(length, 0), N - first), first
    if layout.lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(layout.lengths + b, mask=mask, other=0), 0), T)
    else:
        length = tl.where(mask, T, 0).to(tl.int64)
    return length, b * batch_stride


@triton.jit
def begin(layout, T, B, N, strides, FIRST_GOES_BACK: tl.constexpr, FORM: tl.constexpr):
    """Returns the `Program` of this program instance, for either pass.

    Args:
        strides: a tuple of time_stride, batch_stride, reset_time_stride and reset_batch_stride.
        FIRST_GOES_BACK: whether the pass goes back in time in direction 0.
    """
    member, group = tl.program_id(0) % FORM.MEMBERS, tl.program_id(0) // FORM.MEMBERS
    block, direction = group, 0
    if FORM.DIRECTIONS == 2:
        block, direction = group // 2, group % 2
    b = (block * FORM.BLOCK_B + tl.arange(0, FORM.BLOCK_B)).to(tl.int64)
    length, first = _sequences(b, layout, T, B, N, strides[1])
    return Program(
        member=member,
        direction=direction,
        group=group,
        back=1 - direction if FIRST_GOES_BACK else direction,
        b=b,
        T=T,
        B=B,
        steps=tl.max(length, axis=0),
        length=length,
        first=first,
        time_stride=strides[0],
        reset_time_stride=strides[2],
        reset_batch_stride=strides[3],
    )


@triton.jit
def of_direction(first, second, program, FORM: tl.constexpr):
    """Returns the pointer for the program's direction."""
    chosen = first
    if FORM.DIRECTIONS == 2:  # noqa: SIM102 - known at compile time
        if program.direction == 1:
            chosen = second
    return chosen


@triton.jit
def offsets_of_direction(program, FORM: tl.constexpr):
    """Returns the offset of the program's direction in a row and in a (directions, B, H) tensor."""
    direction = tl.cast(program.direction, tl.int64)
    return direction * FORM.H, direction * program.B * FORM.H


@triton.jit
def units(i, program, FORM: tl.constexpr):
    """Returns the hidden units of a program's tile i [N]."""
    return (program.member + i * FORM.MEMBERS) * FORM.BLOCK_N + tl.arange(0, FORM.BLOCK_N)


@triton.jit
def time_of(s, program):
    """Returns the time of step s of the pass, clamped to the last step; 0 if there are no steps."""
    s = tl.minimum(s, program.steps - 1)
    return tl.maximum(tl.where(program.back == 1, program.steps - 1 - s, s), 0)


@triton.jit
def row_at(t, layout, program):
    """Returns each sequence's row [B] at time t (a scalar or [B]), valid if t < its length."""
    if layout.starts is not None:
        return program.first + tl.load(layout.starts + t)
    return program.first + t * program.time_stride


@triton.jit
def step_at(t, layout, program, FORM: tl.constexpr):
    """Returns the `Step` of the sequences at time t."""
    alive = t < program.length
    is_first = t == tl.where(program.back == 1, program.length - 1, 0)
    is_cut = is_cut_at(t + program.back, layout, program, FORM)
    return Step(alive=alive, begins=alive & is_first, goes_on=alive & ~is_first, is_cut=is_cut)


@triton.jit
def is_cut_at(border, layout, program, FORM: tl.constexpr):
    """Returns whether a reset cuts each sequence [B] between times border - 1 and border."""
    if layout.reset is None:
        is_cut = tl.full((FORM.BLOCK_B,), 0, tl.int1)
    else:
        place = border * program.reset_time_stride + program.b * program.reset_batch_stride
        is_cut = tl.load(layout.reset + place, mask=border < program.length, other=0) != 0
    return is_cut


@triton.jit
def zeros(dtype: tl.constexpr, FORM: tl.constexpr):
    """Returns zeros [B, N]."""
    return tl.full((FORM.BLOCK_B, FORM.BLOCK_N), 0.0, dtype)


@triton.jit
def load_rows(data, row, n, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Loads units n of rows [B, N]; returns zeros where mask [B] is not set or n >= LIMIT."""
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    return tl.load(data + place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_rows(data, row, n, values, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Stores values [B, N] into units n < LIMIT of the rows for which mask [B] is set."""
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    tl.store(data + place, values, mask=mask)


@triton.jit
def store_zeros_past_the_end(data, n, layout, program, FORM: tl.constexpr):
    """Stores zeros into units n of all rows past the end of the block's longest sequence."""
    nothing = zeros(data.dtype.element_ty, FORM)
    for u in range(program.steps, program.T):
        row = row_at(u, layout, program)
        store_rows(data, row, n, nothing, program.b < program.B, FORM.WIDTH, FORM.LIMIT)


@triton.jit
def meet(arrivals, s, program, FORM: tl.constexpr):
    """Waits at a barrier after step s until the stores of all members of the block are visible.

    Only one thread of a program polls, because Triton executes a scalar atomic operation in one
    thread and broadcasts the result to the program's other threads at a barrier. Every member polls
    at least once, even the last member to arrive, because only an acquire invalidates L1.
    """
    tl.debug_barrier()
    if FORM.MEMBERS > 1:
        arrivals += program.group
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        arrived = tl.full((), 0, tl.int32)
        while arrived < FORM.MEMBERS * (s + 1):
            arrived = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
