"""The forward pass of a layer in one kernel."""

import triton
import triton.language as tl

from .arguments import VARYING
from .primitives import (
    activation,
    begin,
    load_rows,
    meet,
    of_direction,
    offsets_of_direction,
    row_at,
    step_at,
    store_rows,
    store_zeros_past_the_end,
    time_of,
    units,
    zeros,
)
from .recurrent_product import (
    kept_tile,
    load_states,
    product,
    product_of_states,
    streamed_product,
)


@triton.jit
def _place(t, row, program, FORM: tl.constexpr):
    """Returns the rows of output [B] that hold the states of time t (a scalar or [B]).

    With RING, output is a ring buffer for two steps.
    """
    return (t & 1) * program.B + program.b if FORM.RING else row


@triton.jit
def _token(ids, t, layout, program):
    """Loads the token id of each sequence [B] at time t; 0 if the sequence has ended."""
    return tl.load(ids + row_at(t, layout, program), mask=t < program.length, other=0)


@triton.jit
def _row_of_token(token, V, is_known):
    """Returns the table row of each token [B], and whether all tokens so far were in range [B].

    The host does not check ids. An id out of range reads row 0, and an assertion fails after the
    last step.
    """
    has_row = (token >= 0) & (token < V)
    return tl.where(has_row, token, 0), is_known & has_row


@triton.jit
def _first_state(output, hx, n, program, FORM: tl.constexpr):
    """Returns the initial state [B, N]."""
    if hx is None:
        state = zeros(output.dtype.element_ty, FORM)
    else:
        state = load_rows(hx, program.b, n, program.b < program.B, FORM.H, FORM.LIMIT)
    return state


@triton.jit
def _add_bias(z, bias, n, FORM: tl.constexpr):
    """Returns z [B, N] in float32, plus bias if there is one."""
    z = z.to(tl.float32)
    if bias is not None:
        z += tl.load(bias + n, mask=n < FORM.H, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _load_previous_states(previous_states, hx, goes_on, begins, program, FORM: tl.constexpr):
    """Loads the previous states (hx at a sequence's first step), shaped as in `load_states`.

    For a single sequence, a branch chooses between the two addresses. With a select, Triton would
    lose track of the alignment of the addresses.
    """
    if hx is None:
        left = load_states(previous_states, goes_on, FORM)
    else:
        initial = hx + program.b * FORM.H
        some_begin = tl.max(begins.to(tl.int32), axis=0) != 0
        if FORM.BLOCK_B == 1:
            if some_begin:
                previous_states = initial
            left = load_states(previous_states, goes_on | begins, FORM)
        else:
            left = load_states(previous_states, goes_on, FORM)
            if some_begin:
                left += load_states(initial, begins, FORM)
    return left


@triton.jit
def _add_product(z, state, previous_states, hx, step, right, n, program, FORM: tl.constexpr):
    """Returns z [B, N] + the previous states times weight_hh.

    Args:
        state: the previous states, if they are kept on chip.
        previous_states: pointers to the previous states in memory [B].
        hx: the initial states (B, H), or None for zeros.
        right: this program's part of weight_hh, or a pointer to all of weight_hh.
    """
    if FORM.KEEP_STATE:
        state = tl.where(step.is_cut[:, None], 0.0, state).to(state.dtype)
        z = product(state, right, z, FORM)
    else:
        goes_on = step.goes_on & ~step.is_cut
        begins = step.begins & ~step.is_cut
        if FORM.KEEP_WEIGHT:
            left = _load_previous_states(previous_states, hx, goes_on, begins, program, FORM)
            z = product_of_states(left, right, z, FORM)
        else:
            z = streamed_product(previous_states, goes_on, right, n, z, not FORM.TRANSPOSED, FORM)
            if hx is not None:  # noqa: SIM102 - known at compile time
                if tl.max(begins.to(tl.int32), axis=0) != 0:
                    initial = hx + program.b * FORM.H
                    z = streamed_product(initial, begins, right, n, z, not FORM.TRANSPOSED, FORM)
    return z


@triton.jit
def _store_states(output, place, n, h, step, program, FORM: tl.constexpr):
    """Stores the states of one step. If rows are padded, stores zeros for sequences that ended."""
    if FORM.PADDED:
        h = tl.where(step.alive[:, None], h, 0.0).to(h.dtype)
        store_rows(output, place, n, h, program.b < program.B, FORM.WIDTH, FORM.LIMIT)
    elif not (FORM.RING and FORM.KEEP_STATE):
        store_rows(output, place, n, h, step.alive, FORM.WIDTH, FORM.LIMIT)


@triton.jit
def _finish(state, output, hx, h_n, layout, program, FORM: tl.constexpr):
    """Stores h_n from the on-chip state or the rows of the last steps, and zeros the padding."""
    b, there = program.b, program.b < program.B
    t = tl.maximum(tl.where(program.back == 1, 0, program.length - 1), 0)
    place = _place(t, row_at(t, layout, program), program, FORM)
    for i in range(FORM.TILES):
        n = units(i, program, FORM)
        if FORM.KEEP_STATE:
            last = state
        else:
            last = load_rows(output, place, n, program.length > 0, FORM.WIDTH, FORM.LIMIT)
            if hx is not None:
                is_empty = there & (program.length == 0)
                last += load_rows(hx, b, n, is_empty, FORM.H, FORM.LIMIT)
        store_rows(h_n, b, n, last, there, FORM.H, FORM.LIMIT)
        if FORM.PADDED:
            store_zeros_past_the_end(output, n, layout, program, FORM)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    projected,  # (N, directions * H); with ids, the table (V, directions * H)
    ids,  # (N), the row of `projected` to read for each row; None if row n reads row n
    V,  # number of rows of `projected`
    weight_hh,  # (H, H)
    weight_hh_reverse,  # (H, H), weight_hh of the second direction, or None
    bias,  # (H), or None
    bias_reverse,  # (H), bias of the second direction, or None
    hx,  # (directions, B, H), or None for zeros
    output,  # (N, directions * H); with RING, a ring buffer of two steps (2 * B, directions * H)
    h_n,  # (directions, B, H)
    layout,  # `LayoutTensors`
    arrivals,  # (blocks * directions), counters that start at 0; None if there is one member
    T,
    B,
    N,
    time_stride,  # in rows
    batch_stride,
    reset_time_stride,  # in elements
    reset_batch_stride,
    FORM: tl.constexpr,  # `Form`
):
    """Computes output and h_n of one layer: h_t = act(projected_t + bias + h_{t-1} W_hh^T)."""
    strides = (time_stride, batch_stride, reset_time_stride, reset_batch_stride)
    program = begin(layout, T, B, N, strides, False, FORM)
    right = of_direction(weight_hh, weight_hh_reverse, program, FORM)
    bias = None if bias is None else of_direction(bias, bias_reverse, program, FORM)
    columns, of_states = offsets_of_direction(program, FORM)
    projected += columns
    output += columns
    hx = None if hx is None else hx + of_states

    t = time_of(0, program)
    row = row_at(t, layout, program)
    earlier_place = _place(t, row_at(t, layout, program), program, FORM)
    first_source = row  # the row of `projected` to read
    if ids is not None:
        # Load each token one step before its table row, so that no step waits for both loads.
        token = _token(ids, t, layout, program)
        is_known = tl.full((FORM.BLOCK_B,), 1, tl.int1)
        if FORM.KEEP_WEIGHT:
            first_source, is_known = _row_of_token(token, V, is_known)
            token = _token(ids, time_of(1, program), layout, program)
    n = units(0, program, FORM)
    state = _first_state(output, hx, n, program, FORM) if FORM.KEEP_STATE else None
    if FORM.KEEP_WEIGHT:
        right = kept_tile(right, n, True, FORM)
        upcoming = load_rows(projected, first_source, n, t < program.length, FORM.WIDTH, FORM.LIMIT)

    for s in tl.range(0, program.steps, num_stages=1):
        t = time_of(s, program)
        step = step_at(t, layout, program, FORM)
        later_t = time_of(s + 1, program)
        later_row = row_at(later_t, layout, program)
        place = _place(t, row, program, FORM)
        source = later_row if FORM.KEEP_WEIGHT else row
        there = later_t < program.length if FORM.KEEP_WEIGHT else step.alive
        if ids is not None:
            source, is_known = _row_of_token(token, V, is_known)
            token = _token(ids, time_of(s + 1 + FORM.KEEP_WEIGHT, program), layout, program)
        for i in range(FORM.TILES):
            n = units(i, program, FORM)
            z = load_rows(projected, source, n, there, FORM.WIDTH, FORM.LIMIT)
            if FORM.KEEP_WEIGHT:  # The weights stay on chip, so prefetch the next step's inputs.
                z, upcoming = upcoming, z
            z = _add_bias(z, bias, n, FORM)
            previous_states = output + earlier_place * FORM.WIDTH
            z = _add_product(z, state, previous_states, hx, step, right, n, program, FORM)
            h = activation(z, output.dtype.element_ty, FORM)
            if FORM.KEEP_STATE:
                state = tl.where(step.alive[:, None], h, state)
            _store_states(output, place, n, h, step, program, FORM)
        earlier_place = place
        row = later_row
        if not FORM.KEEP_STATE:
            meet(arrivals, s, program, FORM)

    _finish(state, output, hx, h_n + of_states, layout, program, FORM)
    if ids is not None:  # once, not in every step, because an assertion costs a barrier
        tl.device_assert(is_known, "namernn_fast: input must hold ids of rows of the table")
