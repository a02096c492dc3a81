"""What a program of either pass is made of: which rows it has, loads, stores and the barrier."""

import triton
import triton.language as tl

from .arguments import Program, Step

# Programs lie on the first axis of a grid, which alone may have more than 65,535: the members of a
# block of sequences side by side, the directions of a block of sequences side by side, too. Members
# share out the hidden units, in tiles of BLOCK_N: member m has the tiles m, m + MEMBERS, ... A
# program with a single tile, in a single block of K, keeps its part of weight_hh on chip
# across time; a program that is its block's only member keeps the state on chip as well. Otherwise
# the previous state is read back from the rows that the previous step has written, with a barrier
# in between.
#
# The first-level cache does not see the stores of other programs. Loads of what other programs
# write ask to bypass it, but Triton drops that request where it makes a load an asynchronous copy
# in pieces of less than 16 bytes. So correctness rests on the barrier alone: to acquire is to drop
# what that cache holds.
#
# Triton compares values to find the variables that a loop changes: one that is another variable
# before the loop, and becomes that variable again in the body, counts as constant. So no variable
# that a loop assigns is a mere name of another value before the loop, nor is a field of a tuple.


@triton.jit
def tanh(x, IMPROVE: tl.constexpr):
    """tanh by expm1, which is a polynomial, and e / (e + 1), to 2.5 units in the last place.

    The CPU kernel has the same formula, in csrc/kernel/tanh.h. Of approximate instructions there is
    a division, off by 2 units at most; a power of two is made from its exponent. -0 stays -0.

    IMPROVE: whether to take off the division's error, which results of 16 bits do not show.
    """
    a = tl.abs(x)
    a = tl.where(a > 10.0, 10.0, a)  # NaN stays
    shifted = a * 2.885390043258667 + 12582912.0  # 2 / ln 2; 1.5 * 2**23 leaves no fraction
    n = shifted - 12582912.0
    s = tl.fma(n, -0.3465735912322998, a)  # ln 2 / 2, in so few bits that n times it is exact
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
    """Returns the states from their sums z in float32, in another dtype."""
    # relu of NaN is NaN, as in torch.
    h = tanh(z, dtype == tl.float32) if FORM.TANH else tl.where(z <= 0, 0.0, z)
    return h.to(dtype)


@triton.jit
def activation_backward(grad, h, FORM: tl.constexpr):
    return grad * (1 - h * h) if FORM.TANH else tl.where(h <= 0, 0.0, grad)


@triton.jit
def _sequences(b, layout, T, B, N, batch_stride):
    """Returns the number of steps of each sequence [B], and the place of its first row [B].

    Lengths and offsets on the device are unchecked, so they are clamped to the tensors.
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
    """Returns what a program of either pass knows before its first step.

    Args:
        strides: time_stride, batch_stride, reset_time_stride and reset_batch_stride.
        FIRST_GOES_BACK: whether the pass goes back in time in the first direction.
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
    """Returns the pointer of the program's direction, of two."""
    chosen = first
    if FORM.DIRECTIONS == 2:  # noqa: SIM102 - known when it is compiled
        if program.direction == 1:
            chosen = second
    return chosen


@triton.jit
def offsets_of_direction(program, FORM: tl.constexpr):
    """Returns where the program's direction begins, in a row and in states (directions, B, H)."""
    direction = tl.cast(program.direction, tl.int64)
    return direction * FORM.H, direction * program.B * FORM.H


@triton.jit
def units(i, program, FORM: tl.constexpr):
    """Returns the hidden units of a program's tile i [N]."""
    return (program.member + i * FORM.MEMBERS) * FORM.BLOCK_N + tl.arange(0, FORM.BLOCK_N)


@triton.jit
def time_of(s, program):
    """Returns the time of step s of the pass, or of its last step; 0 where there is no step."""
    s = tl.minimum(s, program.steps - 1)
    return tl.maximum(tl.where(program.back == 1, program.steps - 1 - s, s), 0)


@triton.jit
def row_at(t, layout, program):
    """Returns the row of each sequence [B] at time t (a scalar or [B]), if it is alive then."""
    if layout.starts is not None:
        return program.first + tl.load(layout.starts + t)
    return program.first + t * program.time_stride


@triton.jit
def step_at(t, layout, program, FORM: tl.constexpr):
    """Returns which sequences are alive at time t, and how they got there."""
    alive = t < program.length
    is_first = t == tl.where(program.back == 1, program.length - 1, 0)
    is_cut = is_cut_at(t + program.back, layout, program, FORM)
    return Step(alive=alive, begins=alive & is_first, goes_on=alive & ~is_first, is_cut=is_cut)


@triton.jit
def is_cut_at(border, layout, program, FORM: tl.constexpr):
    """Returns whether a state begins anew between the times border - 1 and border [B]."""
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
    """Loads units n of rows [B, N]; zeros where mask [B] is not set and for units from LIMIT on."""
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    return tl.load(data + place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def store_rows(data, row, n, values, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Stores values [B, N] into units n of rows, where mask [B] is set, for units below LIMIT."""
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    tl.store(data + place, values, mask=mask)


@triton.jit
def store_zeros_past_the_end(data, n, layout, program, FORM: tl.constexpr):
    """Stores zeros into units n of the rows that no sequence of the block has a step for."""
    nothing = zeros(data.dtype.element_ty, FORM)
    for u in range(program.steps, program.T):
        row = row_at(u, layout, program)
        store_rows(data, row, n, nothing, program.b < program.B, FORM.WIDTH, FORM.LIMIT)


@triton.jit
def meet(arrivals, s, program, FORM: tl.constexpr):
    """A barrier after step s: returns when the stores of all members of the block are visible.

    One thread polls: Triton lets one thread execute an atomic operation on a scalar, and hands the
    result to the others at a barrier of the program. All members poll once at least, the last one
    to arrive as well, since to acquire is to drop what the first-level cache holds.
    """
    tl.debug_barrier()
    if FORM.MEMBERS > 1:
        arrivals += program.group
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        arrived = tl.full((), 0, tl.int32)
        while arrived < FORM.MEMBERS * (s + 1):
            arrived = tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
