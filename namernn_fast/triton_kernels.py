"""The operators on GPUs, in Triton: kernels, the rule that says how they run, launchers.

A layer's input is projected for all rows at once, by a matrix product of torch's; then one kernel
runs the recurrence, its loop over time inside. Backward, one kernel runs it the other way and
leaves dz of every row, of which all other gradients are matrix products. Nothing waits for the
device: which rows exist is read where the kernels run.

Legend: T time steps, B sequences, H hidden units, N rows; a row is the vector that belongs to one
(time, sequence) pair. Beside a value in a kernel stands its shape, in which B is the block of
sequences that a program has, K a block of the units that are summed over, and N one of those that
are computed.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ops

# ---- Kernels ----
#
# Programs lie in a grid (members, blocks of sequences, directions). The members of a block share
# out its hidden units, in tiles of BLOCK_N: member m has the tiles m, m + MEMBERS, ... A program
# with a single tile, in a single block of K, keeps its part of weight_hh on chip across time; one
# without other members keeps the state as well. Otherwise the state of a step is read back from
# the rows that the step before has written, with a barrier in between.


@triton.jit
def _tanh(x):
    """The formula of csrc/simd-inl.h: expm1 by a polynomial, then e / (e + 1); -0 stays -0."""
    a = tl.abs(x)
    a = tl.where(a > 10.0, 10.0, a)  # NaN stays
    n = tl.floor(a * 2.885390043258667 + 0.5)  # 2 / ln 2
    s = tl.fma(n, -0.3465735912322998, a)  # ln 2 / 2, in so few bits that n times it is exact
    c = tl.fma(s, 0.0446286706909, 0.133865452122)
    c = tl.fma(s, c, 0.333330255182)
    c = tl.fma(s, c, 0.666661717641)
    c = tl.fma(s, c, 1.00000001239)
    power = tl.exp2(n)
    e = tl.fma(power, tl.fma(c, s * s, s), 0.5 * power - 0.5)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return ((e / (e + 1)).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _activation(z, TANH: tl.constexpr):
    # As torch has it, relu of NaN is NaN.
    return _tanh(z) if TANH else tl.where(z <= 0, 0.0, z)


@triton.jit
def _activation_backward(grad, h, TANH: tl.constexpr):
    return grad * (1 - h * h) if TANH else tl.where(h <= 0, 0.0, grad)


@triton.jit
def _sequences(b, B, lengths, offsets, T, N, batch_step):
    """The number of steps of each sequence, and the place of its first row: [B] each.

    Values from the device are kept within the tensors, for nobody has checked them.
    """
    mask = b < B
    if offsets is not None:
        first = tl.load(offsets + b, mask=mask, other=0)
        first = tl.minimum(tl.maximum(first, 0), N)
        length = tl.load(offsets + b + 1, mask=mask, other=0) - first
        return tl.minimum(tl.maximum(length, 0), N - first), first
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + b, mask=mask, other=0), 0), T)
    else:
        length = tl.where(mask, T, 0).to(tl.int64)
    return length, b * batch_step


@triton.jit
def _row(t, first, starts, time_step):
    """The rows at time t, one number or [B], of the sequences that are alive then [B]."""
    if starts is not None:
        return first + tl.load(starts + t)
    return first + t * time_step


@triton.jit
def _is_cut(border, b, length, reset, reset_time, reset_batch):
    """Whether a state is dropped between the times border - 1 and border [B]."""
    place = border * reset_time + b * reset_batch
    return tl.load(reset + place, mask=border < length, other=0) != 0


@triton.jit
def _load_rows(data, row, n, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Units n of rows [B, N], zeros where the mask [B] is not set, and from LIMIT on, if any.

    Past the first-level cache, which does not have what other programs wrote.
    """
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    return tl.load(data + place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_rows(data, row, n, values, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    tl.store(data + place, values, mask=mask)


@triton.jit
def _tile(weight, k, n, H: tl.constexpr):
    """The transpose of a weight (H, H), for the units k and n [K, N]."""
    return tl.load(
        weight + n[None, :] * H + k[:, None], mask=(k[:, None] < H) & (n[None, :] < H), other=0.0
    )


@triton.jit
def _product(left, right, sum, PRECISION: tl.constexpr):
    """sum [B, N] + left [B, K] right [K, N], a single sequence without tensor cores."""
    if left.shape[0] == 1:
        terms = tl.trans(left).to(tl.float32) * right.to(tl.float32)
        return sum + tl.sum(terms, axis=0)[None, :]
    return tl.dot(left, right, sum, input_precision=PRECISION)


# A slice of weight_hh with few units n would lie in every warp anew, if warps could not share out
# the units k that are summed over: so these come in PARTS, a dimension of their own.


@triton.jit
def _tile_in_parts(weight, n, H: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """The same for all units k [PARTS, K / PARTS, N]."""
    part = tl.arange(0, PARTS) * (BLOCK_K // PARTS)
    k = part[:, None, None] + tl.arange(0, BLOCK_K // PARTS)[None, :, None]
    n = n[None, None, :]
    return tl.load(weight + n * H + k, mask=(k < H) & (n < H), other=0.0)


@triton.jit
def _load_states(states, mask, H: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """All units of states [B, K], in parts [PARTS, B, K / PARTS] if there are several."""
    if PARTS == 1:
        k = tl.arange(0, BLOCK_K)[None, :]
        place, mask = states[:, None] + k, mask[:, None]
    else:
        part = tl.arange(0, PARTS) * (BLOCK_K // PARTS)
        k = part[:, None, None] + tl.arange(0, BLOCK_K // PARTS)[None, None, :]
        place, mask = states[None, :, None] + k, mask[None, :, None]
    if H % BLOCK_K != 0:
        mask = mask & (k < H)
    return tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _kept_product(left, right, sum, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sum [B, N] + states times a tile of weight_hh that is on chip, both in parts or neither."""
    if PARTS == 1:
        sum = _product(left, right, sum, PRECISION)
    else:
        sum += tl.sum(tl.dot(left, right, input_precision=PRECISION), axis=0)
    return sum


@triton.jit
def _streamed_product(
    states,
    mask,
    weight,
    n,
    sum,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum [B, N] + the states before [B, H] times weight_hh, both read block by block."""
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        some = mask[:, None] if H % BLOCK_K == 0 else mask[:, None] & (k[None, :] < H)
        left = tl.load(states[:, None] + k[None, :], mask=some, other=0.0, cache_modifier=".cg")
        sum = _product(left, _tile(weight, k, n, H), sum, PRECISION)
    return sum


@triton.jit
def _meet(arrivals, arrived, MEMBERS: tl.constexpr):
    """Returns when all members of a block have arrived and what they stored can be read."""
    tl.debug_barrier()
    if MEMBERS > 1:
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        while tl.load(arrivals, volatile=True) < arrived:
            pass
        tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


# Sizes that vary from call to call, for which nothing is compiled anew.
VARYING = ["T", "B", "N", "time_step", "batch_step", "reset_time", "reset_batch"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    projected,  # (N, directions * H)
    weight_hh,  # (H, H)
    weight_hh_reverse,  # of the second direction, or None
    bias_hh,  # (H), or None
    bias_hh_reverse,
    hx,  # (directions, B, H), or None: zeros
    output,  # (N, directions * H)
    h_n,  # (directions, B, H)
    lengths,  # (B), or None: T each
    offsets,  # (B + 1), or None
    starts,  # (T), the number of rows before each time, or None
    reset,  # at (t * reset_time + b * reset_batch), or None
    arrivals,  # (directions, blocks), zeros, or None: there is one member
    T,
    B,
    N,
    time_step,  # in rows
    batch_step,
    reset_time,
    reset_batch,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PADDED: tl.constexpr,  # whether there are rows past the end of sequences
    TANH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILES: tl.constexpr,  # of each member
    PARTS: tl.constexpr,  # of what is summed over, for other warps each
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output and h_n of one layer: h_t = act(projected_t + b_hh + h_{t-1} W_hh^T)."""
    KEEP_WEIGHT: tl.constexpr = TILES == 1 and BLOCK_K >= H
    KEEP_STATE: tl.constexpr = KEEP_WEIGHT and MEMBERS == 1
    WIDTH: tl.constexpr = DIRECTIONS * H
    LIMIT_N: tl.constexpr = None if MEMBERS * TILES * BLOCK_N == H else H
    dtype: tl.constexpr = output.dtype.element_ty
    member, block = tl.program_id(0), tl.program_id(1)
    back = tl.program_id(2)  # the direction: the second goes back in time
    weight, bias = weight_hh, bias_hh
    if DIRECTIONS == 2:  # noqa: SIM102 - known when it is compiled
        if back == 1:
            weight = weight_hh_reverse
            if bias is not None:
                bias = bias_hh_reverse
    projected += back * H
    output += back * H
    h_n += back.to(tl.int64) * B * H
    if hx is not None:
        hx += back.to(tl.int64) * B * H
    if MEMBERS > 1:
        arrivals += back * tl.num_programs(1) + block

    b = (block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    length, first = _sequences(b, B, lengths, offsets, T, N, batch_step)
    steps = tl.max(length, axis=0)
    begin = tl.where(back == 1, length - 1, 0)
    end = tl.where(back == 1, 0, length - 1)
    t = tl.maximum(back * (steps - 1), 0)
    row = _row(t, first, starts, time_step)
    row_before = row
    n = member * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEEP_WEIGHT:
        if PARTS == 1:
            right = _tile(weight, tl.arange(0, BLOCK_K), n, H)
        else:
            right = _tile_in_parts(weight, n, H, BLOCK_K, PARTS)
        upcoming = _load_rows(projected, row, n, t < length, WIDTH, LIMIT_N)
    if KEEP_STATE:
        if hx is None:
            state = tl.zeros((BLOCK_B, BLOCK_N), dtype)
        else:
            state = _load_rows(hx, b, n, b < B, H, LIMIT_N)

    for s in tl.range(0, steps, num_stages=1):
        t = s + back * (steps - 1 - 2 * s)
        alive = t < length
        goes_on = alive & (t != begin)
        begins = alive & (t == begin)
        if reset is not None:
            is_cut = _is_cut(t + back, b, length, reset, reset_time, reset_batch)
            goes_on = goes_on & ~is_cut
            begins = begins & ~is_cut
        before = output + row_before * WIDTH
        if hx is not None:
            initial = hx + b * H
            some_begin = tl.max(begins.to(tl.int32), axis=0) != 0
        t_after = tl.minimum(tl.maximum(t + 1 - 2 * back, 0), steps - 1)
        row_after = _row(t_after, first, starts, time_step)
        for i in range(TILES):
            n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
            if KEEP_WEIGHT:
                z = upcoming.to(tl.float32)
                upcoming = _load_rows(projected, row_after, n, t_after < length, WIDTH, LIMIT_N)
            else:
                z = _load_rows(projected, row, n, alive, WIDTH, LIMIT_N).to(tl.float32)
            if bias is not None:
                z += tl.load(bias + n, mask=n < H, other=0.0).to(tl.float32)[None, :]
            if KEEP_STATE:
                if reset is not None:
                    state = tl.where(is_cut[:, None], 0.0, state).to(dtype)
                z = _product(state, right, z, PRECISION)
            elif KEEP_WEIGHT:
                left = _load_states(before, goes_on, H, BLOCK_K, PARTS)
                if hx is not None and some_begin:
                    left += _load_states(initial, begins, H, BLOCK_K, PARTS)
                z = _kept_product(left, right, z, PARTS, PRECISION)
            else:
                z = _streamed_product(before, goes_on, weight, n, z, H, BLOCK_K, STAGES, PRECISION)
                if hx is not None and some_begin:
                    z = _streamed_product(
                        initial, begins, weight, n, z, H, BLOCK_K, STAGES, PRECISION
                    )
            h = _activation(z, TANH).to(dtype)
            if KEEP_STATE:
                state = tl.where(alive[:, None], h, state)
            if PADDED:
                h = tl.where(alive[:, None], h, 0.0).to(dtype)
                _store_rows(output, row, n, h, b < B, WIDTH, LIMIT_N)
            else:
                _store_rows(output, row, n, h, alive, WIDTH, LIMIT_N)
        row_before = row
        row = row_after
        if not KEEP_STATE:
            _meet(arrivals, MEMBERS * (s + 1), MEMBERS)

    row = _row(tl.maximum(end, 0), first, starts, time_step)
    for i in range(TILES):
        n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
        if not KEEP_STATE:
            state = _load_rows(output, row, n, length > 0, WIDTH, LIMIT_N)
            if hx is not None:
                state += _load_rows(hx, b, n, (b < B) & (length == 0), H, LIMIT_N)
        _store_rows(h_n, b, n, state, b < B, H, LIMIT_N)
        if PADDED:
            zeros = tl.zeros((BLOCK_B, BLOCK_N), dtype)
            for u in range(steps, T):
                row_u = _row(u, first, starts, time_step)
                _store_rows(output, row_u, n, zeros, b < B, WIDTH, LIMIT_N)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_output,  # (N, directions * H), or None: zeros
    grad_h_n,  # (directions, B, H), or None: zeros
    weight_hh,  # (H, H), transposed
    weight_hh_reverse,  # of the second direction, or None
    hx,  # (directions, B, H), or None: zeros
    output,  # (N, directions * H)
    dz,  # (N, directions * H): the gradient before the activation
    previous,  # (N, directions * H): the state that each row came from, or None: not wanted
    dz_last,  # (directions, B, H): what grad_hx lacks but for a product with weight_hh
    grad_hx,  # (directions, B, H), or None: neither is wanted
    lengths,  # from here on as in forward_kernel
    offsets,
    starts,
    reset,
    arrivals,
    T,
    B,
    N,
    time_step,
    batch_step,
    reset_time,
    reset_batch,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PADDED: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The recurrence the other way: dz_t = (grad_output_t + dz_{t+1} W_hh) act'(h_t)."""
    KEEP_WEIGHT: tl.constexpr = TILES == 1 and BLOCK_K >= H
    KEEP_STATE: tl.constexpr = KEEP_WEIGHT and MEMBERS == 1
    WIDTH: tl.constexpr = DIRECTIONS * H
    LIMIT_N: tl.constexpr = None if MEMBERS * TILES * BLOCK_N == H else H
    dtype: tl.constexpr = output.dtype.element_ty
    member, block, direction = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    back = 1 - direction
    weight = weight_hh
    if DIRECTIONS == 2:  # noqa: SIM102 - known when it is compiled
        if direction == 1:
            weight = weight_hh_reverse
    state_place = direction.to(tl.int64) * B * H
    output += direction * H
    dz += direction * H
    if previous is not None:
        previous += direction * H
    if grad_output is not None:
        grad_output += direction * H
    if grad_h_n is not None:
        grad_h_n += state_place
    if hx is not None:
        hx += state_place
    if grad_hx is not None:
        dz_last += state_place
        grad_hx += state_place
    if MEMBERS > 1:
        arrivals += direction * tl.num_programs(1) + block

    b = (block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    length, first = _sequences(b, B, lengths, offsets, T, N, batch_step)
    steps = tl.max(length, axis=0)
    begin = tl.where(back == 1, length - 1, 0)
    end = tl.where(back == 1, 0, length - 1)
    t = tl.maximum(back * (steps - 1), 0)
    row = _row(t, first, starts, time_step)
    row_before = row
    n = member * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEEP_WEIGHT:
        if PARTS == 1:
            right = _tile(weight, tl.arange(0, BLOCK_K), n, H)
        else:
            right = _tile_in_parts(weight, n, H, BLOCK_K, PARTS)
        upcoming_h = _load_rows(output, row, n, t < length, WIDTH, LIMIT_N)
        if grad_output is not None:
            upcoming_grad = _load_rows(grad_output, row, n, t < length, WIDTH, LIMIT_N)
    if KEEP_STATE:
        state = tl.zeros((BLOCK_B, BLOCK_N), dtype)  # dz of the step before

    for s in tl.range(0, steps, num_stages=1):
        t = s + back * (steps - 1 - 2 * s)
        alive = t < length
        goes_on = alive & (t != begin)
        receives = goes_on
        if reset is not None:
            receives = goes_on & ~_is_cut(t + back, b, length, reset, reset_time, reset_batch)
        before = dz + row_before * WIDTH  # its gradients, of the step before
        t_after = tl.minimum(tl.maximum(t + 1 - 2 * back, 0), steps - 1)
        row_after = _row(t_after, first, starts, time_step)
        for i in range(TILES):
            n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
            grad = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
            if KEEP_WEIGHT:
                h = upcoming_h
                upcoming_h = _load_rows(output, row_after, n, t_after < length, WIDTH, LIMIT_N)
                if grad_output is not None:
                    grad += upcoming_grad.to(tl.float32)
                    upcoming_grad = _load_rows(
                        grad_output, row_after, n, t_after < length, WIDTH, LIMIT_N
                    )
            else:
                h = _load_rows(output, row, n, alive, WIDTH, LIMIT_N)
                if grad_output is not None:
                    grad += _load_rows(grad_output, row, n, alive, WIDTH, LIMIT_N).to(tl.float32)
            if grad_h_n is not None:
                begins = alive & (t == begin)
                grad += _load_rows(grad_h_n, b, n, begins, H, LIMIT_N).to(tl.float32)
            if KEEP_STATE:
                left = tl.where(receives[:, None], state, 0.0).to(dtype)
                grad = _product(left, right, grad, PRECISION)
            elif KEEP_WEIGHT:
                left = _load_states(before, receives, H, BLOCK_K, PARTS)
                grad = _kept_product(left, right, grad, PARTS, PRECISION)
            else:
                grad = _streamed_product(
                    before, receives, weight, n, grad, H, BLOCK_K, STAGES, PRECISION
                )
            own = _activation_backward(grad, h.to(tl.float32), TANH).to(dtype)
            if KEEP_STATE:
                state = tl.where(alive[:, None], own, state)
            h = tl.where(receives[:, None], h, 0.0).to(dtype)
            if previous is not None:
                _store_rows(previous, row_before, n, h, goes_on, WIDTH, LIMIT_N)
            if PADDED:
                own = tl.where(alive[:, None], own, 0.0).to(dtype)
                _store_rows(dz, row, n, own, b < B, WIDTH, LIMIT_N)
                if previous is not None:
                    zeros = tl.zeros((BLOCK_B, BLOCK_N), dtype)
                    _store_rows(previous, row, n, zeros, (b < B) & ~alive, WIDTH, LIMIT_N)
            else:
                _store_rows(dz, row, n, own, alive, WIDTH, LIMIT_N)
        row_before = row
        row = row_after
        if not KEEP_STATE:
            _meet(arrivals, MEMBERS * (s + 1), MEMBERS)

    row = _row(tl.maximum(end, 0), first, starts, time_step)
    receives = length > 0
    if reset is not None:
        border = tl.where(back == 1, 0, length)
        receives = receives & ~_is_cut(border, b, length, reset, reset_time, reset_batch)
    for i in range(TILES):
        n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
        if hx is not None:
            initial = _load_rows(hx, b, n, receives, H, LIMIT_N)
        else:
            initial = tl.zeros((BLOCK_B, BLOCK_N), dtype)
        if previous is not None:
            _store_rows(previous, row, n, initial, length > 0, WIDTH, LIMIT_N)
        if grad_hx is not None:
            if KEEP_STATE:
                last = tl.where(receives[:, None], state, 0.0).to(dtype)
            else:
                last = _load_rows(dz, row, n, receives, WIDTH, LIMIT_N)
            _store_rows(dz_last, b, n, last, b < B, H, LIMIT_N)
            if grad_h_n is None:
                handed_on = tl.zeros((BLOCK_B, BLOCK_N), dtype)
            else:
                empty = (b < B) & (length == 0)
                handed_on = _load_rows(grad_h_n, b, n, empty, H, LIMIT_N)
            _store_rows(grad_hx, b, n, handed_on, b < B, H, LIMIT_N)
        if PADDED:
            zeros = tl.zeros((BLOCK_B, BLOCK_N), dtype)
            for u in range(steps, T):
                row_u = _row(u, first, starts, time_step)
                _store_rows(dz, row_u, n, zeros, b < B, WIDTH, LIMIT_N)
                if previous is not None:
                    _store_rows(previous, row_u, n, zeros, b < B, WIDTH, LIMIT_N)


# ---- The rule ----


class Device(NamedTuple):
    """What the rule wants to know of a device."""

    backend: str
    """`cuda`, or `hip`."""
    arch: str
    """`sm_90`, or `gfx942`."""
    shared: int
    """Bytes of shared memory that one program can have."""
    processors: int
    """Streaming multiprocessors, or compute units."""

    @property
    def meeting(self) -> int:
        """How many programs may wait for each other.

        One on AMD, where Triton's barrier within a program does not wait for what all of its warps
        have stored: those of other programs could miss it.
        """
        return self.processors if self.backend == "cuda" else 1

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return 32 if self.backend == "cuda" else 64


class Config(NamedTuple):
    """How the recurrence of a layer is shared out among programs."""

    block_b: int
    """Sequences of a program."""
    block_n: int
    """Hidden units that it computes at once."""
    block_k: int
    """Hidden units that it sums over at once."""
    members: int
    """Programs that share the hidden units of a block of sequences."""
    tiles: int
    """Blocks of hidden units that each of them has."""
    parts: int
    """In how many parts warps share out what is summed over."""
    warps: int
    stages: int
    """Tiles of weight_hh on their way at once, where it is not kept."""
    precision: str
    """Of products in float32, as `tl.dot` has it: `ieee` or `tf32`."""

    @property
    def regime(self) -> str:
        """`resident`: one program has all of weight_hh on chip; `cooperative`: each of several has
        a part of it there; `streamed`: it is read at every step, by one program or by several."""
        if self.tiles > 1 or self.block_k < self.block_n * self.members:
            return "streamed"
        return "resident" if self.members == 1 else "cooperative"


_KEPT_IN_REGISTERS = 64  # values of weight_hh in a thread, where no tensor core takes them
# Bytes beyond which registers would not do: of more than 16 sequences where one program has all of
# weight_hh, of a slice of weight_hh and a block of states where it does not.
_LARGE_ROWS = 8 * 1024
_KEPT_WITH_ROWS = 128 * 1024


def choose(
    hidden_size: int,
    batch: int,
    dtype: torch.dtype,
    device: Device,
    *,
    directions: int = 1,
    tf32: bool = False,
) -> Config:
    """The rule: how a layer of this size runs on this device, if nothing was tuned for it.

    - weight_hh stays on chip across time if one program can hold it: in shared memory, for tensor
      cores; in float32 without TF32 in the registers of a program that has one sequence.
    - If not, but several can, and all programs of the grid can run at once, they do, and meet at a
      barrier in every step.
    - If not, it is read at every step, by as many programs for each block of sequences as can run
      at once, in the tiles for which reads and multiply-adds are estimated to take the fewest
      cycles.

    Args:
        hidden_size, batch, directions: of the layer.
        dtype: of its tensors, float32, bfloat16 or float16.
        device: what it runs on.
        tf32: whether products in float32 may be rounded to TF32.
    """
    whole = max(16, triton.next_power_of_2(hidden_size))
    if dtype.itemsize == 4 and not tf32:
        config = _choose_without_tensor_cores(hidden_size, batch * directions, whole, device)
        return config or _choose_streamed(hidden_size, batch, directions, "ieee", 4, device)
    precision = "tf32" if dtype.itemsize == 4 else "ieee"

    size = dtype.itemsize
    # As few sequences as tensor cores take, unless there are more blocks than processors.
    kept = whole * whole * size
    for block_b in (64, 32, 16):
        rows = block_b * whole * size
        few = triton.cdiv(batch, block_b // 2) * directions <= device.processors
        large = few or rows > _LARGE_ROWS
        if (block_b == 16 or not large) and kept + rows + block_b * whole * 4 <= device.shared:
            warps = _warps(max(kept // 128, rows // 32), device)
            return Config(block_b, whole, whole, 1, 1, 1, warps, 1, precision)
    for block_b, block_n in ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32)):
        kept, rows = whole * block_n * size, block_b * whole * size
        members, blocks = triton.cdiv(hidden_size, block_n), triton.cdiv(batch, block_b)
        if kept + rows > min(_KEPT_WITH_ROWS, device.shared):
            continue
        if members * blocks * directions <= device.meeting:
            warps = min(8, whole // 32)
            return Config(block_b, block_n, whole, members, 1, warps, warps, 1, precision)
    return _choose_streamed(hidden_size, batch, directions, precision, size, device)


def _warps(threads, device) -> int:
    return min(16, max(4, triton.next_power_of_2(triton.cdiv(threads, device.lanes))))


def _choose_without_tensor_cores(hidden_size, sequences, whole, device) -> Config | None:
    for threads in (128, 256, 512):
        kept = threads * _KEPT_IN_REGISTERS
        block_n = min(whole, kept // whole)
        if block_n == 0 or (block_n < whole and threads == 128):
            continue
        members = triton.cdiv(hidden_size, block_n)
        if members == 1 or members * sequences <= device.meeting:
            return Config(1, block_n, whole, members, 1, 1, threads // device.lanes, 1, "ieee")
    return None


class _Tile(NamedTuple):
    """One where weight_hh is streamed; names as in `Config`."""

    block_b: int
    block_n: int
    block_k: int
    warps: int
    stages: int


_TILES = {
    "CUDA cores": (_Tile(16, 32, 16, 4, 3), _Tile(32, 32, 16, 4, 3), _Tile(32, 64, 16, 8, 3)),
    "tf32": (
        *(_Tile(16, 32, 32, 4, 3), _Tile(16, 64, 32, 4, 3), _Tile(32, 64, 32, 4, 3)),
        _Tile(64, 64, 32, 8, 2),
    ),
    "16 bits": (
        *(_Tile(16, 32, 64, 4, 3), _Tile(16, 64, 64, 4, 3), _Tile(32, 64, 64, 4, 3)),
        *(_Tile(64, 64, 64, 8, 2), _Tile(64, 128, 64, 8, 2)),
    ),
}
# What is known of an H100, in bytes and cycles: what a processor reads of L2 in one, the part of
# all processors that can at the same time, and a barrier among programs.
_PORT = 64
_READING = 0.6
_BARRIER = 2600


def _choose_streamed(hidden_size, batch, directions, precision, itemsize, device) -> Config:
    """The tiles with which a step takes the fewest cycles, by estimate."""
    without_cores = itemsize == 4 and precision == "ieee"
    kind = "CUDA cores" if without_cores else "tf32" if itemsize == 4 else "16 bits"
    found: dict[Config, float] = {}
    for block_b, block_n, block_k, warps, stages in _TILES[kind]:
        read = (block_b + block_n) * itemsize  # for each unit that is summed over
        if stages * read * block_k > device.shared:
            continue
        blocks = triton.cdiv(batch, block_b) * directions
        tiles = triton.cdiv(hidden_size, block_n)
        members = min(tiles, max(1, device.meeting // blocks))
        members = triton.next_power_of_2(members + 1) // 2  # so that tiles come out even
        tiles = triton.cdiv(tiles, members)
        programs = members * blocks
        busy = min(1, programs / device.processors)
        cycles = read / _PORT * max(1, busy / _READING)
        if without_cores:  # by the instructions of the compiled loops, four a cycle
            cycles = max(cycles, (block_b * block_n + 180) / 90)
        cycles *= hidden_size * tiles * triton.cdiv(programs, device.processors)
        config = Config(block_b, block_n, block_k, members, tiles, 1, warps, stages, precision)
        found[config] = cycles + (_BARRIER if members > 1 else 0)
    return min(found, key=lambda config: found[config])


# ---- Launchers ----


class _Rows(NamedTuple):
    """Which rows exist and where they lie; names as in the kernels."""

    lengths: Tensor | None
    offsets: Tensor | None
    starts: Tensor | None
    reset: Tensor | None
    T: int
    B: int
    N: int
    time_step: int
    batch_step: int
    reset_time: int = 0
    reset_batch: int = 0

    @property
    def padded(self) -> bool:
        return self.lengths is not None and self.starts is None


class _Stack(NamedTuple):
    """What both passes are told of a stack of layers; weights are contiguous."""

    rows: _Rows
    hx: Tensor | None
    weights: Sequence[Tensor]
    options: int
    directions: int
    hidden_size: int

    def layers(self):
        """The initial states of each layer, and the weights of each of its directions."""
        for hx, weights in ops.layers_of(self.hx, self.weights, self.options):
            count = len(weights) // self.directions
            yield hx, [weights[i : i + count] for i in range(0, len(weights), count)]


@functools.cache
def constants_of(config: Config) -> dict[str, Any]:
    """What a kernel is compiled for, of a configuration."""
    return {
        "BLOCK_B": config.block_b,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "MEMBERS": config.members,
        "TILES": config.tiles,
        "PARTS": config.parts,
        "STAGES": config.stages,
        "PRECISION": config.precision,
    }


@functools.cache
def options_of(config: Config, device: Device) -> dict[str, Any]:
    """How Triton is to compile and launch it."""
    options = {
        "num_warps": config.warps,
        "enable_fp_fusion": True,
        "launch_cooperative_grid": config.members > 1,
    }
    if device.backend == "cuda":
        # All that there are: left to itself the compiler spills some, so that more programs fit.
        options["maxnreg"] = min(255, 65536 // (config.warps * device.lanes))
    return options


def _launch(kernel, stack: _Stack, like: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Runs a kernel over the rows of `like`, with `tensors` before the arguments that all share."""
    rows = stack.rows
    if rows.B == 0:
        return
    config = configuration(stack.hidden_size, rows.B, like, stack.directions)
    blocks = -(-rows.B // config.block_b)
    arrivals = None
    if config.members > 1:
        arrivals = like.new_zeros(stack.directions * blocks, dtype=torch.int32)
    constants = {
        "H": stack.hidden_size,
        "DIRECTIONS": stack.directions,
        "PADDED": rows.padded,
        "TANH": not stack.options & ops.RELU,
        **constants_of(config),
    }
    grid = (config.members, blocks, stack.directions)
    arguments = (*tensors, *rows[:4], arrivals, *rows[4:])
    _run(kernel, grid, arguments, constants, options_of(config, device_of(like)))


def _run(kernel, grid, arguments, constants, options) -> None:
    kernel[grid](*arguments, **constants, **options)


def _on_device_of(tensor: Tensor) -> contextlib.ExitStack:
    """Kernels go to the device of the tensor, and torch's own operators do but what they say."""
    device = tensor.device
    stack = contextlib.ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(device.type):
        stack.enter_context(torch.autocast(device.type, enabled=False))
    if tensor.is_cuda and device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(device))
    return stack


def _of_directions(rows: Tensor, stack: _Stack) -> Sequence[Tensor]:
    """The part (rows, hidden_size) of each direction."""
    return rows.unflatten(1, (stack.directions, stack.hidden_size)).unbind(1)


def _pair(of_each_direction):
    return of_each_direction if len(of_each_direction) == 2 else (*of_each_direction, None)


def _join(of_each_direction: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(of_each_direction) if len(of_each_direction) == 2 else of_each_direction[0]


def _forward_layer(stack: _Stack, x, hx, weights, output, h_n) -> None:
    """A layer from its input's rows: output (rows, directions * hidden_size), and h_n."""
    weights_ih, weights_hh, *biases = zip(*weights, strict=True)
    bias_ih, biases_hh = (_join(biases[0]), biases[1]) if biases else (None, [None] * len(weights))
    # Apart from the output: a program may read a row ahead of the one that it writes.
    projected = torch.nn.functional.linear(x, _join(weights_ih), bias_ih)
    tensors = (projected, *_pair(weights_hh), *_pair(biases_hh), hx, output, h_n)
    _launch(forward_kernel, stack, x, tensors)


def _backward_layer(
    stack: _Stack, hx, weights, output, grad_output, grad_h_n, dz, previous, grad_hx, grad_input
) -> None:
    """The recurrence of a layer, and from its dz the gradients of hx and input, where wanted."""
    dz_last = None if grad_hx is None else torch.empty_like(grad_hx)
    # Transposed once, so that both kernels read a weight the same way.
    weights_hh = _pair([own[1].t().contiguous() for own in weights])
    tensors = (grad_output, grad_h_n, *weights_hh, hx, output, dz, previous, dz_last, grad_hx)
    _launch(backward_kernel, stack, output, tensors)
    if grad_hx is not None and dz_last is not None:
        for grad, last, own in zip(grad_hx.unbind(0), dz_last.unbind(0), weights, strict=True):
            grad.addmm_(last, own[1])
    if grad_input is not None:
        torch.mm(dz, _join([own[0] for own in weights]), out=grad_input)


def _weight_gradients(stack: _Stack, x, weights, dz, previous) -> list[Tensor]:
    """Those of a layer, in the order of its weights."""
    gradients = []
    parts = (_of_directions(dz, stack), _of_directions(previous, stack), weights)
    for own_dz, before, own in zip(*parts, strict=True):
        transposed = own_dz.t()
        gradients += [transposed @ x, transposed @ before]
        if own[2:]:
            grad_bias = own_dz.sum(0)
            gradients += [grad_bias, grad_bias.clone()]
    return gradients


# ---- Layers at the same time ----
#
# A stretch of steps of one layer waits for that stretch of the layer below, backward above, and for
# the stretch before of its own. So layers of one direction can run at the same time, a stretch
# apart, each on a stream of its own.

_STRETCH = 128  # steps, at least: fewer take less time than launching them
_STRETCHES = 8  # at most


class _Stretch(NamedTuple):
    rows: _Rows
    begin: int
    """Its first row."""
    end: int

    def of(self, tensor: Tensor | None) -> Tensor | None:
        """Its part of all rows."""
        if tensor is None or self.end - self.begin == len(tensor):
            return tensor
        return tensor[self.begin : self.end]


def _stretches(stack: _Stack, num_layers: int, like: Tensor) -> list[_Stretch]:
    """One of all steps, unless there are layers that can run at the same time."""
    rows, uneven = stack.rows, ops.BATCH_FIRST | ops.PACKED | ops.JAGGED | ops.BIDIRECTIONAL
    count = 1
    if num_layers > 1 and rows.T >= 2 * _STRETCH and rows.B and not stack.options & uneven:
        config = configuration(stack.hidden_size, rows.B, like, stack.directions)
        programs = config.members * -(-rows.B // config.block_b)
        if num_layers * programs <= device_of(like).processors:
            count = min(_STRETCHES, rows.T // _STRETCH)
    return _cut(rows, count)


def _cut(rows: _Rows, count: int) -> list[_Stretch]:
    """Time-major rows in stretches of as many steps, give or take one."""
    if count == 1:
        return [_Stretch(rows, 0, rows.N)]
    found = []
    for i in range(count):
        first, last = rows.T * i // count, rows.T * (i + 1) // count
        steps, lengths = last - first, rows.lengths
        if lengths is not None:
            lengths = (lengths - first).clamp(0, steps)
        reset = None if rows.reset is None else rows.reset[first:last]
        part = rows._replace(lengths=lengths, reset=reset, T=steps, N=steps * rows.B)
        found.append(_Stretch(part, first * rows.B, last * rows.B))
    return found


class _InTurn:
    """Runs tasks on the stream that there is, in the order in which they come."""

    def __enter__(self):
        return self

    def __exit__(self, *raised) -> None:
        pass

    def run(self, layer: int, after: int | None, task: Callable[[], object]) -> None:
        """Behind the last task of this layer, and that of the layer `after`."""
        task()

    def finish(self, task: Callable[[], object]) -> None:
        """Behind all tasks so far; its memory is that of the stream that there is."""
        task()


class _AtOnce(_InTurn):
    """Runs tasks on a stream for each layer. What they leave must not be allocated in them."""

    def __init__(self, like: Tensor, num_layers: int):
        self.main = torch.cuda.current_stream(like.device)
        self.streams = _streams(like.device, num_layers)
        self.done: dict[int, torch.cuda.Event] = {}
        self.last: list[Callable[[], object]] = []

    def __enter__(self):
        for stream in self.streams:
            stream.wait_stream(self.main)
        return self

    def __exit__(self, *raised) -> None:
        for stream in self.streams:
            self.main.wait_stream(stream)
        if raised == (None, None, None):
            for task in self.last:
                task()

    def run(self, layer: int, after: int | None, task: Callable[[], object]) -> None:
        stream = self.streams[layer]
        if after is not None:
            stream.wait_event(self.done[after])
        with torch.cuda.stream(stream):
            task()
        self.done[layer] = stream.record_event()

    def finish(self, task: Callable[[], object]) -> None:
        self.last.append(task)


@functools.cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


def _lanes(stretches: list[_Stretch], num_layers: int, like: Tensor) -> _InTurn:
    return _AtOnce(like, num_layers) if len(stretches) > 1 else _InTurn()


def _forward_stack(stack: _Stack, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The outputs of all layers (rows, directions * hidden_size), and h_n."""
    layers = list(stack.layers())
    stretches = _stretches(stack, len(layers), x)
    outputs = [x.new_empty(len(x), stack.directions * stack.hidden_size) for _ in layers]
    h_n = x.new_empty(len(layers) * stack.directions, stack.rows.B, stack.hidden_size)
    into = h_n.chunk(len(layers))
    # The states between stretches go from one tensor to the other, and end in h_n.
    out_of = torch.empty_like(h_n).chunk(len(layers)) if len(stretches) > 1 else into
    if len(stretches) % 2 == 0:
        into, out_of = out_of, into
    with _lanes(stretches, len(layers), x) as lanes:
        for i, stretch in enumerate(stretches):
            for k, (hx, weights) in enumerate(layers):
                task = functools.partial(
                    _forward_layer,
                    stack._replace(rows=stretch.rows),
                    stretch.of(outputs[k - 1] if k else x),
                    out_of[k] if i else hx,
                    weights,
                    stretch.of(outputs[k]),
                    into[k],
                )
                lanes.run(k, k - 1 if k else None, task)
            into, out_of = out_of, into
    return outputs, h_n


def _backward_stack(
    stack: _Stack, x, outputs, grad_output, grad_h_n, grad_hx, want_input, want_layers
) -> tuple[Tensor | None, dict[int, list[Tensor]]]:
    """The gradients of the input's rows and, by layer, of weights; that of hx into `grad_hx`."""
    layers = list(stack.layers())
    lowest = 0 if want_input or grad_hx is not None else min(want_layers, default=len(layers))
    stretches = _stretches(stack, len(layers), x)
    none = [None] * len(layers)
    # Of the initial and the last states: of all steps, and of a stretch, which hands them on.
    grads_hx = none if grad_hx is None else grad_hx.chunk(len(layers))
    grads_h_n = none if grad_h_n is None else grad_h_n.chunk(len(layers))
    states = (len(layers), stack.rows.B, stack.hidden_size)
    into, out_of = none, none
    if len(stretches) > 1:
        into, out_of = (x.new_empty(states).chunk(len(layers)) for _ in range(2))
    grads = [*none, grad_output]  # of the input of each layer, and of the output
    work: dict[int, tuple[Tensor, Tensor | None]] = {}  # dz, and the states before
    grad_weights = {}

    def finish(k):
        dz, previous = work.pop(k)
        grads[k + 1] = None
        if previous is not None:
            below = outputs[k - 1] if k else x
            grad_weights[k] = _weight_gradients(stack, below, layers[k][1], dz, previous)

    with _lanes(stretches, len(layers), x) as lanes:
        for i, stretch in reversed(list(enumerate(stretches))):
            is_last = i == len(stretches) - 1
            for k in reversed(range(lowest, len(layers))):
                hx, weights = layers[k]
                if is_last:
                    previous = torch.empty_like(outputs[k]) if k in want_layers else None
                    work[k] = torch.empty_like(outputs[k]), previous
                    if want_input or k > lowest:
                        grads[k] = torch.empty_like(outputs[k - 1] if k else x)
                if i:
                    hx = outputs[k][stretch.begin - stack.rows.B : stretch.begin].unsqueeze(0)
                dz, previous = work[k]
                task = functools.partial(
                    _backward_layer,
                    stack._replace(rows=stretch.rows),
                    hx,
                    weights,
                    stretch.of(outputs[k]),
                    stretch.of(grads[k + 1]),
                    grads_h_n[k] if is_last else out_of[k],
                    stretch.of(dz),
                    stretch.of(previous),
                    into[k] if i else grads_hx[k],
                    stretch.of(grads[k]),
                )
                lanes.run(k, k + 1 if k + 1 < len(layers) else None, task)
                if i == 0:
                    lanes.finish(functools.partial(finish, k))
            into, out_of = out_of, into
    return grads[0], grad_weights


# ---- The operators ----


def rnn_forward(input, hx, weights, rows, reset, options):
    """`namernn_fast::rnn_forward` on a GPU; arguments and results as in `namernn_fast.ops`."""
    _require(not options & ops.BATCH_INVARIANT, "batch_invariant is not promised on a GPU")
    stack, x = _checked_stack(input, hx, weights, rows, reset, options)
    with _on_device_of(input):
        outputs, h_n = _forward_stack(stack, x)
    outputs = [output.view(*input.shape[:-1], output.shape[1]) for output in outputs]
    return outputs[-1], h_n, outputs[:-1] if options & ops.WANT_HIDDEN else []


def rnn_backward(
    grad_output,
    grad_h_n,
    input,
    hx,
    weights,
    output,
    hidden,
    rows,
    reset,
    options,
    want_input,
    want_hx,
    want_layers,
):
    """`namernn_fast::rnn_backward` on a GPU; arguments and results as in `namernn_fast.ops`."""
    stack, x = _checked_stack(input, hx, weights, rows, reset, options)
    num_layers = ops.layer_count(weights, options)
    width = stack.directions * stack.hidden_size
    _require(
        len(hidden) == num_layers - 1,
        "hidden must hold the outputs of {} layer(s), got {}",
        *(num_layers - 1, len(hidden)),
    )
    for name, tensor in (
        ("output", output),
        ("grad_output", grad_output),
        *(("hidden", tensor) for tensor in hidden),
    ):
        _check_tensor(name, tensor, input, (*input.shape[:-1], width))
    states = (num_layers * stack.directions, stack.rows.B, stack.hidden_size)
    _check_tensor("grad_h_n", grad_h_n, input, states)
    for k in want_layers:
        _require(0 <= k < num_layers, "want_layers must be from 0 to {}, got {}", num_layers - 1, k)
    with _on_device_of(input):
        if stack.rows.padded and 0 in want_layers:
            # What lies past the end of a sequence may be NaN, which zeros of dz would not hide.
            steps = torch.arange(stack.rows.T, device=input.device)
            past = steps >= rows.unsqueeze(1)
            past = past if options & ops.BATCH_FIRST else past.t()
            x = input.masked_fill(past.unsqueeze(2), 0.0)
            x = x.flatten(0, 1)
        outputs = [layer.flatten(0, -2).contiguous() for layer in (*hidden, output)]
        grad = None if grad_output is None else grad_output.flatten(0, -2).contiguous()
        grad_hx = torch.empty_like(stack.hx) if want_hx else None
        grad_h_n = None if grad_h_n is None else grad_h_n.contiguous()
        grad_input, found = _backward_stack(
            stack, x, outputs, grad, grad_h_n, grad_hx, want_input, want_layers
        )
    nothing = input.new_empty(0)
    grad_weights = []
    for k, (_, own) in enumerate(ops.layers_of(None, weights, options)):
        grad_weights += found.get(k) or [w.new_empty(0) for w in own]
    return (
        grad_input.view(input.shape) if want_input else nothing,
        grad_hx if want_hx else nothing,
        grad_weights if want_layers else [],
    )


def _require(condition: bool, message: str, *values: Any) -> None:
    """The text is made where there is an error only: it would take longer than all checks."""
    if not condition:
        raise RuntimeError("namernn_fast: " + message.format(*values))


def _check_tensor(name: str, tensor: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    _require(
        tensor.device == like.device,
        "{} must be on the device of input, {}, got {}: move one of them with .to()",
        *(name, like.device, tensor.device),
    )
    _require(tensor.dtype == like.dtype, "{} must have the dtype of input", name)
    _require(tensor.shape == shape, "{} must have shape {}, got {}", name, shape, _Shape(tensor))


class _Shape:
    """Of a tensor, as an error shows it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __str__(self) -> str:
        return str(tuple(self.tensor.shape))


def _checked_stack(input, hx, weights, rows, reset, options) -> tuple[_Stack, Tensor]:
    """The arguments of an operator, checked, and the rows (rows, features) of its input."""
    directions, per_layer = ops.directions_of(options), ops.weights_per_layer(options)
    _require(
        len(weights) > 0 and len(weights) % per_layer == 0,
        "weights must hold {} tensors for each layer, got {}",
        *(per_layer, len(weights)),
    )
    _require(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got {}", weights[1].dim())
    _require(
        input.dtype in ops.TRITON_DTYPES,
        "input must be of one of {}, got {}",
        *(ops.TRITON_DTYPES, input.dtype),
    )
    read = _read_rows(input, rows, reset, options)
    hidden_size = weights[1].shape[0]
    count = per_layer // directions
    due = (
        ("weight_ih", (hidden_size, input.shape[-1])),
        ("weight_hh", (hidden_size, hidden_size)),
        ("bias_ih", (hidden_size,)),
        ("bias_hh", (hidden_size,)),
    )
    for i, weight in enumerate(weights):
        name, shape = due[i % count]
        if i >= per_layer and i % count == 0:
            shape = (hidden_size, directions * hidden_size)
        _check_tensor(name, weight, input, shape)
    states = ops.layer_count(weights, options) * directions
    _check_tensor("hx", hx, input, (states, read.B, hidden_size))
    stack = _Stack(
        read,
        None if hx is None else hx.contiguous(),
        [weight.contiguous() for weight in weights],
        options,
        directions,
        hidden_size,
    )
    return stack, input.flatten(0, -2)


def _read_rows(input, rows, reset, options) -> _Rows:
    """Which rows there are, of what an operator is told."""
    packed, jagged = options & ops.PACKED, options & ops.JAGGED
    batch_first = options & ops.BATCH_FIRST
    _require(not (packed and jagged), "options must not say both packed and jagged")
    dimensions = 2 if packed or jagged else 3
    _require(
        input.dim() == dimensions,
        "input must have {} dimensions, got {}",
        *(dimensions, input.dim()),
    )
    name = "batch_sizes" if packed else "offsets" if jagged else "lengths"
    _require(rows is not None or dimensions == 3, "rows must be the {} of input, got none", name)
    _require(
        rows is None
        or packed
        or (rows.device == input.device and rows.dtype == torch.int64 and rows.dim() == 1),
        "{} must be a 1-D int64 tensor on the device of input",
        name,
    )
    N = input.shape[0] if dimensions == 2 else input.shape[0] * input.shape[1]
    if packed:
        read = _read_batch_sizes(rows, input, N)
    elif jagged:
        _require(len(rows) > 0, "offsets must have one element at least")
        read = _Rows(None, rows.contiguous(), None, None, N, len(rows) - 1, N, 1, 0)
    else:
        T, B = input.shape[1::-1] if batch_first else input.shape[:2]
        _require(T > 0, "Expected sequence length to be larger than 0 in RNN")
        if rows is not None:
            _require(
                len(rows) == B,
                "lengths must have one length for each of the {} sequences, got {}",
                *(B, len(rows)),
            )
            rows = rows.contiguous()
        steps = (1, T) if batch_first else (B, 1)
        read = _Rows(rows, None, None, None, T, B, N, *steps)
    if reset is None:
        return read
    shape = (read.B, read.T) if batch_first else (read.T, read.B)
    _require(
        reset.device == input.device and reset.dtype == torch.bool,
        "reset must be a bool tensor on the device of input",
    )
    _require(reset.shape == shape, "reset must have shape {}, got {}", shape, _Shape(reset))
    strides = reset.stride()
    return read._replace(
        reset=reset.view(torch.uint8),
        reset_time=strides[1 if batch_first else 0],
        reset_batch=strides[0 if batch_first else 1],
    )


def _read_batch_sizes(batch_sizes, input, N) -> _Rows:
    """Packed rows: the host knows where they lie, and tells the device without waiting for it."""
    _require(
        batch_sizes.is_cpu and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1,
        "batch_sizes must be a 1-D int64 tensor on the CPU",
    )
    sizes = batch_sizes.tolist()
    _require(bool(sizes), "Expected sequence length to be larger than 0 in RNN")
    for t, size in enumerate(sizes):
        _require(size >= 1, "batch_sizes must be positive, got {} at step {}", size, t)
        _require(
            t == 0 or size <= sizes[t - 1],
            "batch_sizes must not increase, got {} after {} at step {}",
            *(size, sizes[t - 1], t),
        )
    _require(
        sum(sizes) == N,
        "batch_sizes must sum to the rows of data, {}, got a sum of {}",
        *(N, sum(sizes)),
    )
    T, B = len(sizes), sizes[0]
    starts = batch_sizes.cumsum(0) - batch_sizes
    # How many steps have more than b sequences, for every b.
    lengths = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True)
    table = torch.cat([starts, lengths])
    if input.is_cuda:
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
        table = table.to(input.device, non_blocking=True)
    starts, lengths = table.split([T, B])
    return _Rows(lengths, None, starts, None, T, B, N, 0, 1)


_captured: list[Tensor] = []
"""What a CUDA graph reads again at every replay: kept for the life of the process."""


# ---- This machine ----


@functools.cache
def _device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Device("hip", arch, 64 * 1024, properties.multi_processor_count)
    return Device(
        "cuda",
        f"sm_{properties.major}{properties.minor}",
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def device_of(tensor: Tensor) -> Device:
    """What the rule is told of the device that a tensor is on."""
    return _device(tensor.get_device())


def may_round_to_tf32(device: Device) -> bool:
    """Whether torch's own setting lets an RNN round float32 to TF32; not on AMD."""
    rnn: Any = torch.backends.cudnn.rnn
    return device.backend == "cuda" and rnn.fp32_precision == "tf32"


class _Size(NamedTuple):
    """What a configuration is chosen by."""

    hidden_size: int
    batch: int
    dtype: torch.dtype
    device: Device
    directions: int
    tf32: bool

    @functools.cache  # noqa: B019 - it keeps a few numbers for each size
    def choose(self) -> Config:
        return choose(
            *(self.hidden_size, self.batch, self.dtype, self.device),
            directions=self.directions,
            tf32=self.tf32,
        )


_tuned: dict[_Size, Config] = {}


def _size(hidden_size: int, batch: int, like: Tensor, directions: int) -> _Size:
    device = device_of(like)
    tf32 = like.dtype == torch.float32 and may_round_to_tf32(device)
    return _Size(hidden_size, batch, like.dtype, device, directions, tf32)


def configuration(hidden_size: int, batch: int, like: Tensor, directions: int) -> Config:
    """What `autotune` found for a layer of this size, else what the rule says."""
    size = _size(hidden_size, batch, like, directions)
    return _tuned.get(size) or size.choose()


def autotune(
    input: Tensor, hidden_size: int, *, bidirectional: bool = False, measure=None
) -> Config:
    """Times the configurations that may suit a layer and keeps the best one for this process.

    Nothing else times anything: without it the rule alone decides.

    Args:
        input: (seq_len, batch, features), on a GPU, of the sizes and the dtype to tune for.
        hidden_size, bidirectional: of the layer.
        measure: what to time, in place of a forward and a backward pass: milliseconds of `call()`.

    Returns:
        What calls with this batch, dtype and hidden size run by from now on.
    """
    directions = 2 if bidirectional else 1
    layer = torch.nn.RNN(
        input.shape[2],
        hidden_size,
        bidirectional=bidirectional,
        device=input.device,
        dtype=input.dtype,
    )
    weights = [p.detach() for p in layer.parameters()]
    options = ops.BIAS | ops.WANT_HIDDEN | (ops.BIDIRECTIONAL if bidirectional else 0)
    rows = (None, None, options)  # all of them, without a reset

    def call():
        output, h_n, _ = rnn_forward(input, None, weights, *rows)
        rnn_backward(output, h_n, input, None, weights, output, [], *rows, True, False, [0])

    size = _size(hidden_size, input.shape[1], input, directions)
    taken: dict[Config, float] = {}
    for config in _candidates(size):
        _tuned[size] = config
        try:
            taken[config] = (measure or triton.testing.do_bench)(call)
        except triton.runtime.errors.OutOfResources:  # it does not fit: no candidate
            continue
        finally:
            del _tuned[size]
    _tuned[size] = min(taken, key=lambda config: taken[config])
    return _tuned[size]


def _candidates(size: _Size) -> list[Config]:
    """What the rule says for this size and for other batches, with more warps and with fewer."""
    chosen = [size.choose()]
    chosen += [size._replace(batch=batch).choose() for batch in (1, 16, 64, 256, 1024, 4096)]
    found = []
    for config in chosen:
        blocks = triton.cdiv(size.batch, config.block_b) * size.directions
        if config.members > 1 and config.members * blocks > size.device.meeting:
            continue
        found += [config._replace(warps=warps) for warps in (4, 8, 16)]
    return list(dict.fromkeys(found))
