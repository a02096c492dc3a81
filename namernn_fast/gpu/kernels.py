"""The recurrence of a layer in one kernel, forward and backward; and sums of rows by token.

Shapes are written in brackets: B is the block of sequences of a program, K a block of the hidden
units that are summed over, N a block of the hidden units that are computed.
"""

import triton
import triton.language as tl

# Programs lie in a grid (members, blocks of sequences, directions). The members of a block of
# sequences share out the hidden units, in tiles of BLOCK_N: member m has the tiles m, m + MEMBERS,
# ... A program with a single tile, in a single block of K, keeps its part of weight_hh on chip
# across time; a program that is its block's only member keeps the state on chip as well. Otherwise
# the previous state is read back from the rows that the previous step has written, with a barrier
# in between.
#
# Triton compares values to find the variables that a loop changes: one that is another variable
# before the loop, and becomes that variable again in the body, counts as constant. So no variable
# that a loop assigns is a mere name of another before the loop.


@triton.jit
def _tanh(x):
    """tanh by expm1, which is a polynomial, and e / (e + 1); -0 stays -0.

    The CPU kernel has the same formula, in csrc/kernel/tanh.h.
    """
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
    # relu of NaN is NaN, as in torch.
    return _tanh(z) if TANH else tl.where(z <= 0, 0.0, z)


@triton.jit
def _activation_backward(grad, h, TANH: tl.constexpr):
    return grad * (1 - h * h) if TANH else tl.where(h <= 0, 0.0, grad)


@triton.jit
def _sequences(b, B, lengths, offsets, T, N, batch_stride):
    """Returns the number of steps of each sequence [B], and the place of its first row [B].

    Lengths and offsets on the device are unchecked, so they are clamped to the tensors.
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
    return length, b * batch_stride


@triton.jit
def _times(length, back):
    """Returns the steps of the longest sequence, the time at which the pass begins, and the times
    of the first and the last step of each sequence in the order of the pass [B]."""
    steps = tl.max(length, axis=0)
    t = tl.maximum(back * (steps - 1), 0)
    begin = tl.where(back == 1, length - 1, 0)
    end = tl.where(back == 1, 0, length - 1)
    return steps, t, begin, end


@triton.jit
def _row(t, first, starts, time_stride):
    """Returns the row of each sequence [B] at time t (a scalar or [B]), if it is alive then."""
    if starts is not None:
        return first + tl.load(starts + t)
    return first + t * time_stride


@triton.jit
def _at_step(t, by, back, steps):
    """Returns the time `by` steps of the pass after time t, or that of its last step."""
    return tl.minimum(tl.maximum(t + by - 2 * by * back, 0), steps - 1)


@triton.jit
def _place(t, b, row, B, RING: tl.constexpr):
    """Returns where the states of time t (a scalar or [B]) lie in the output [B].

    That is the row of that time, or a place in a ring of two steps.
    """
    return (t & 1) * B + b if RING else row


@triton.jit
def _token(ids, t, row, length):
    """Loads the token id of each sequence [B] at time t, from its row; 0 where it has none."""
    return tl.load(ids + row, mask=t < length, other=0)


@triton.jit
def _row_of_token(token, V, is_known):
    """Returns the row of the table for each token [B], and whether all tokens so far have one [B].

    Ids on the device are unchecked: one that has no row takes row 0, and an assertion tells later.
    """
    has_row = (token >= 0) & (token < V)
    return tl.where(has_row, token, 0), is_known & has_row


@triton.jit
def _is_cut(border, b, length, reset, reset_time_stride, reset_batch_stride):
    """Returns whether a state begins anew between the times border - 1 and border [B]."""
    place = border * reset_time_stride + b * reset_batch_stride
    return tl.load(reset + place, mask=border < length, other=0) != 0


@triton.jit
def _load_rows(data, row, n, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Loads units n of rows [B, N]; zeros where mask [B] is not set and for units from LIMIT on.

    Bypasses the first-level cache, which does not see the stores of other programs.
    """
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    return tl.load(data + place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_rows(data, row, n, values, mask, WIDTH: tl.constexpr, LIMIT: tl.constexpr):
    """Stores values [B, N] into units n of rows, where mask [B] is set, for units below LIMIT."""
    place = row[:, None] * WIDTH + n[None, :]
    mask = mask[:, None]
    if LIMIT is not None:
        mask = mask & (n[None, :] < LIMIT)
    tl.store(data + place, values, mask=mask)


@triton.jit
def _tile(weight, k, n, H: tl.constexpr):
    """Loads the transpose of a weight (H, H) for the units k and n [K, N]."""
    return tl.load(
        weight + n[None, :] * H + k[:, None], mask=(k[:, None] < H) & (n[None, :] < H), other=0.0
    )


@triton.jit
def _product(left, right, sum, PRECISION: tl.constexpr):
    """Returns sum [B, N] + left [B, K] right [K, N]; one sequence without tensor cores."""
    if left.shape[0] == 1:
        terms = tl.trans(left).to(tl.float32) * right.to(tl.float32)
        return sum + tl.sum(terms, axis=0)[None, :]
    return tl.dot(left, right, sum, input_precision=PRECISION)


# Warps share out the units n of a tile of weight_hh. With few units n every warp would hold a copy
# of the tile; so the sum over the units k is split into PARTS, which warps share out as well.


@triton.jit
def _kept_tile(weight, n, H: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """Loads the transpose of a weight (H, H) for all units k and the units n.

    Its shape is [K, N], or [PARTS, K / PARTS, N] with several parts.
    """
    if PARTS == 1:
        tile = _tile(weight, tl.arange(0, BLOCK_K), n, H)
    else:
        part = tl.arange(0, PARTS) * (BLOCK_K // PARTS)
        k = part[:, None, None] + tl.arange(0, BLOCK_K // PARTS)[None, :, None]
        n = n[None, None, :]
        tile = tl.load(weight + n * H + k, mask=(k < H) & (n < H), other=0.0)
    return tile


@triton.jit
def _load_states(states, mask, H: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """Loads all units of states [B, K], as [PARTS, B, K / PARTS] with several parts."""
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
    """Returns sum [B, N] + states times a tile of weight_hh on chip, both split into PARTS."""
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
    """Returns sum [B, N] + previous states [B, H] times weight_hh, both read block by block."""
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        some = mask[:, None] if H % BLOCK_K == 0 else mask[:, None] & (k[None, :] < H)
        left = tl.load(states[:, None] + k[None, :], mask=some, other=0.0, cache_modifier=".cg")
        sum = _product(left, _tile(weight, k, n, H), sum, PRECISION)
    return sum


@triton.jit
def _meet(arrivals, arrived, MEMBERS: tl.constexpr):
    """A barrier: returns when all members of a block have arrived and their stores are visible."""
    tl.debug_barrier()
    if MEMBERS > 1:
        tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
        while tl.load(arrivals, volatile=True) < arrived:
            pass
        tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


# Arguments that vary from call to call: a kernel is not compiled anew for their values.
VARYING = ["T", "B", "N", "V", "time_stride", "batch_stride"]
VARYING += ["reset_time_stride", "reset_batch_stride"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    projected,  # (N, directions * H); with ids (V, directions * H): the table
    ids,  # (N), the row of `projected` for each row, or None: its own
    V,  # rows of `projected`
    weight_hh,  # (H, H)
    weight_hh_reverse,  # (H, H), of the second direction, or None
    bias,  # (H), or None
    bias_reverse,  # (H), of the second direction, or None
    hx,  # (directions, B, H), or None: zeros
    output,  # (N, directions * H); with RING (2 * B, directions * H): two steps in turn
    h_n,  # (directions, B, H)
    lengths,  # (B), or None: T each
    offsets,  # (B + 1), or None
    starts,  # (T), the number of rows before each time, or None
    reset,  # at (t * reset_time_stride + b * reset_batch_stride), or None
    arrivals,  # (directions, blocks), zeros, or None: there is one member
    T,
    B,
    N,
    time_stride,  # in rows
    batch_stride,
    reset_time_stride,
    reset_batch_stride,
    H: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    PADDED: tl.constexpr,  # whether rows past the end of sequences are to be zeroed
    RING: tl.constexpr,  # whether h_n alone is wanted, and output is memory to work in
    TANH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    TILES: tl.constexpr,  # tiles of each member
    PARTS: tl.constexpr,  # into which the sum over hidden units is split, for different warps
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes output and h_n of one layer: h_t = act(projected_t + bias + h_{t-1} W_hh^T)."""
    KEEP_WEIGHT: tl.constexpr = TILES == 1 and BLOCK_K >= H
    KEEP_STATE: tl.constexpr = KEEP_WEIGHT and MEMBERS == 1
    WIDTH: tl.constexpr = DIRECTIONS * H
    LIMIT_N: tl.constexpr = None if MEMBERS * TILES * BLOCK_N == H else H
    dtype: tl.constexpr = output.dtype.element_ty
    member, block = tl.program_id(0), tl.program_id(1)
    back = tl.program_id(2)  # the direction; the second direction goes back in time
    weight = weight_hh
    if DIRECTIONS == 2:  # noqa: SIM102 - known when it is compiled
        if back == 1:
            weight = weight_hh_reverse
            if bias is not None:
                bias = bias_reverse
    projected += back * H
    output += back * H
    h_n += back.to(tl.int64) * B * H
    if hx is not None:
        hx += back.to(tl.int64) * B * H
    if MEMBERS > 1:
        arrivals += back * tl.num_programs(1) + block

    b = (block * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    length, first = _sequences(b, B, lengths, offsets, T, N, batch_stride)
    steps, t, begin, end = _times(length, back)
    row = _row(t, first, starts, time_stride)
    place_before = _place(t, b, row, B, RING)
    n = member * BLOCK_N + tl.arange(0, BLOCK_N)
    source_begin = row  # the row of `projected` to read before the first step
    if ids is not None:
        # A token is loaded a step before its row of the table: no step waits for both in turn.
        token = _token(ids, t, row, length)
        is_known = tl.full((BLOCK_B,), 1, tl.int1)
        if KEEP_WEIGHT:
            source_begin, is_known = _row_of_token(token, V, is_known)
            t_after = tl.maximum(_at_step(t, 1, back, steps), 0)  # there may be no step
            token = _token(ids, t_after, _row(t_after, first, starts, time_stride), length)
    if KEEP_WEIGHT:
        right = _kept_tile(weight, n, H, BLOCK_K, PARTS)
        upcoming = _load_rows(projected, source_begin, n, t < length, WIDTH, LIMIT_N)
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
            is_cut = _is_cut(t + back, b, length, reset, reset_time_stride, reset_batch_stride)
            goes_on = goes_on & ~is_cut
            begins = begins & ~is_cut
        before = output + place_before * WIDTH
        if hx is not None:
            initial = hx + b * H
            some_begin = tl.max(begins.to(tl.int32), axis=0) != 0
        t_after = _at_step(t, 1, back, steps)
        row_after = _row(t_after, first, starts, time_stride)
        place = _place(t, b, row, B, RING)
        source = row_after if KEEP_WEIGHT else row  # the row of `projected` to read in this step
        if ids is not None:
            source, is_known = _row_of_token(token, V, is_known)
            t_token = _at_step(t, 2, back, steps) if KEEP_WEIGHT else t_after
            token = _token(ids, t_token, _row(t_token, first, starts, time_stride), length)
        for i in range(TILES):
            n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
            if KEEP_WEIGHT:
                z = upcoming.to(tl.float32)
                upcoming = _load_rows(projected, source, n, t_after < length, WIDTH, LIMIT_N)
            else:
                z = _load_rows(projected, source, n, alive, WIDTH, LIMIT_N).to(tl.float32)
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
                _store_rows(output, place, n, h, b < B, WIDTH, LIMIT_N)
            elif not (RING and KEEP_STATE):
                _store_rows(output, place, n, h, alive, WIDTH, LIMIT_N)
        place_before = place
        row = row_after
        if not KEEP_STATE:
            _meet(arrivals, MEMBERS * (s + 1), MEMBERS)

    t_end = tl.maximum(end, 0)
    place = _place(t_end, b, _row(t_end, first, starts, time_stride), B, RING)
    for i in range(TILES):
        n = (member + i * MEMBERS) * BLOCK_N + tl.arange(0, BLOCK_N)
        if not KEEP_STATE:
            state = _load_rows(output, place, n, length > 0, WIDTH, LIMIT_N)
            if hx is not None:
                state += _load_rows(hx, b, n, (b < B) & (length == 0), H, LIMIT_N)
        _store_rows(h_n, b, n, state, b < B, H, LIMIT_N)
        if PADDED:
            zeros = tl.zeros((BLOCK_B, BLOCK_N), dtype)
            for u in range(steps, T):
                row_u = _row(u, first, starts, time_stride)
                _store_rows(output, row_u, n, zeros, b < B, WIDTH, LIMIT_N)
    if ids is not None:  # not in every step: an assertion is a barrier
        tl.device_assert(is_known, "namernn_fast: input must hold ids of rows of the table")


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_output,  # (N, directions * H), or None: zeros
    grad_h_n,  # (directions, B, H), or None: zeros
    weight_hh,  # (H, H), transposed
    weight_hh_reverse,  # (H, H), transposed, of the second direction, or None
    hx,  # (directions, B, H), or None: zeros
    output,  # (N, directions * H)
    dz,  # (N, directions * H): the gradient before the activation
    previous,  # (N, directions * H): the previous state of each row, or None: not wanted
    dz_last,  # (directions, B, H): dz of the first steps, to be multiplied by weight_hh for grad_hx
    grad_hx,  # (directions, B, H), or None: neither it nor dz_last is wanted
    lengths,  # this and all further arguments as in forward_kernel
    offsets,
    starts,
    reset,
    arrivals,
    T,
    B,
    N,
    time_stride,
    batch_stride,
    reset_time_stride,
    reset_batch_stride,
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
    """Computes dz of a layer, from the end: dz_t = (grad_output_t + dz_{t+1} W_hh) act'(h_t)."""
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
    length, first = _sequences(b, B, lengths, offsets, T, N, batch_stride)
    steps, t, begin, end = _times(length, back)
    row = _row(t, first, starts, time_stride)
    row_before = _row(t, first, starts, time_stride)
    n = member * BLOCK_N + tl.arange(0, BLOCK_N)
    if KEEP_WEIGHT:
        right = _kept_tile(weight, n, H, BLOCK_K, PARTS)
        upcoming_h = _load_rows(output, row, n, t < length, WIDTH, LIMIT_N)
        if grad_output is not None:
            upcoming_grad = _load_rows(grad_output, row, n, t < length, WIDTH, LIMIT_N)
    if KEEP_STATE:
        state = tl.zeros((BLOCK_B, BLOCK_N), dtype)  # dz of the previous step of this pass

    for s in tl.range(0, steps, num_stages=1):
        t = s + back * (steps - 1 - 2 * s)
        alive = t < length
        goes_on = alive & (t != begin)
        receives = goes_on
        if reset is not None:
            receives = goes_on & ~_is_cut(
                t + back, b, length, reset, reset_time_stride, reset_batch_stride
            )
        before = dz + row_before * WIDTH  # dz of the previous step of this pass
        t_after = _at_step(t, 1, back, steps)
        row_after = _row(t_after, first, starts, time_stride)
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
                received = _product(left, right, grad, PRECISION)
            elif KEEP_WEIGHT:
                left = _load_states(before, receives, H, BLOCK_K, PARTS)
                received = _kept_product(left, right, grad, PARTS, PRECISION)
            else:
                received = _streamed_product(
                    before, receives, weight, n, grad, H, BLOCK_K, STAGES, PRECISION
                )
            # Where nothing is received, zero times an infinite weight would make NaN.
            grad = tl.where(receives[:, None], received, grad)
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

    row = _row(tl.maximum(end, 0), first, starts, time_stride)
    receives = length > 0
    if reset is not None:
        border = tl.where(back == 1, 0, length)
        receives = receives & ~_is_cut(
            border, b, length, reset, reset_time_stride, reset_batch_stride
        )
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
                row_u = _row(u, first, starts, time_stride)
                _store_rows(dz, row_u, n, zeros, b < B, WIDTH, LIMIT_N)
                if previous is not None:
                    _store_rows(previous, row_u, n, zeros, b < B, WIDTH, LIMIT_N)


@triton.jit(do_not_specialize=["V"])
def sums_by_token_kernel(
    rows,  # (N, WIDTH)
    order,  # (N), the numbers of the rows, sorted by token
    borders,  # (V + 1), the place in `order` where the rows of each token begin
    sums,  # (parts, V, WIDTH), float32
    V,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows that are read at once
    STAGES: tl.constexpr,
):
    """Computes the sum of the rows of each token in parts, each of every so many blocks of rows.

    Programs lie in a grid (V, blocks of units, parts).
    """
    token, part = tl.program_id(0), tl.program_id(2)
    begin, end = tl.load(borders + token), tl.load(borders + token + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    step = tl.num_programs(2) * BLOCK_R
    for start in tl.range(begin + part * BLOCK_R, end, step, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK_R)
        row = tl.load(order + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & (n[None, :] < WIDTH)
        values = tl.load(rows + row[:, None] * WIDTH + n[None, :], mask=mask, other=0.0)
        sum += values.to(tl.float32)
    place = (part.to(tl.int64) * V + token) * WIDTH + n
    tl.store(sums + place, tl.sum(sum, axis=0), mask=n < WIDTH)
