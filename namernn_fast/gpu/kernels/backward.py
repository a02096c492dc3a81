"""The backward pass of a layer's recurrence in one kernel.

The kernel computes the last step first. At each step, the "later" step has just been computed, and
the "earlier" step is computed next.
"""

import triton
import triton.language as tl

from .arguments import VARYING
from .primitives import (
    activation_backward,
    begin,
    is_cut_at,
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
def _inputs(output, grad_output, row, there, n, FORM: tl.constexpr):
    """Loads the states and the gradient of the output at one time step, both [B, N]."""
    h = load_rows(output, row, n, there, FORM.WIDTH, FORM.LIMIT)
    if grad_output is None:
        grad = zeros(h.dtype, FORM)
    else:
        grad = load_rows(grad_output, row, n, there, FORM.WIDTH, FORM.LIMIT)
    return h, grad


@triton.jit
def _add_product(grad, kept_dz, later_dz, receives, right, n, FORM: tl.constexpr):
    """Returns grad [B, N] + dz of the later step times weight_hh.

    Args:
        kept_dz: dz of the later step, if it is kept on chip.
        later_dz: pointers to dz of the later step in memory [B].
        receives: whether this step's state is the previous state of the later step [B].
        right: this program's part of weight_hh, or a pointer to all of weight_hh.
    """
    if FORM.KEEP_STATE:
        left = tl.where(receives[:, None], kept_dz, 0.0).to(kept_dz.dtype)
        received = product(left, right, grad, FORM)
    elif FORM.KEEP_WEIGHT:
        received = product_of_states(load_states(later_dz, receives, FORM), right, grad, FORM)
    else:
        received = streamed_product(later_dz, receives, right, n, grad, False, FORM)
    # Zeroing dz is not enough: zero times an infinite weight is NaN.
    return tl.where(receives[:, None], received, grad)


@triton.jit
def _finish(
    kept_dz,
    hx,
    grad_h_n,
    dz,
    previous_states,
    dz_first,
    grad_hx,
    layout,
    program,
    FORM: tl.constexpr,
):
    """Stores dz_first, grad_hx and the previous states of the first rows, and zeros the padding."""
    b, length = program.b, program.length
    end = tl.where(program.back == 1, 0, length - 1)
    row = row_at(tl.maximum(end, 0), layout, program)
    border = tl.where(program.back == 1, 0, length)
    receives = (length > 0) & ~is_cut_at(border, layout, program, FORM)
    nothing = zeros(dz.dtype.element_ty, FORM)
    for i in range(FORM.TILES):
        n = units(i, program, FORM)
        if previous_states is not None:
            initial = nothing if hx is None else load_rows(hx, b, n, receives, FORM.H, FORM.LIMIT)
            store_rows(previous_states, row, n, initial, length > 0, FORM.WIDTH, FORM.LIMIT)
        if grad_hx is not None:
            if FORM.KEEP_STATE:
                first = tl.where(receives[:, None], kept_dz, 0.0).to(dz.dtype.element_ty)
            else:
                first = load_rows(dz, row, n, receives, FORM.WIDTH, FORM.LIMIT)
            store_rows(dz_first, b, n, first, b < program.B, FORM.H, FORM.LIMIT)
            handed_on = nothing
            if grad_h_n is not None:
                is_empty = (b < program.B) & (length == 0)
                handed_on = load_rows(grad_h_n, b, n, is_empty, FORM.H, FORM.LIMIT)
            store_rows(grad_hx, b, n, handed_on, b < program.B, FORM.H, FORM.LIMIT)
        if FORM.PADDED:
            store_zeros_past_the_end(dz, n, layout, program, FORM)
            if previous_states is not None:
                store_zeros_past_the_end(previous_states, n, layout, program, FORM)


@triton.jit
def _store(previous_states, dz, later_row, row, n, h, own_dz, step, program, FORM: tl.constexpr):
    """Stores dz of one step, and its states h as the previous states of the later step."""
    there = program.b < program.B
    if previous_states is not None:
        store_rows(previous_states, later_row, n, h, step.goes_on, FORM.WIDTH, FORM.LIMIT)
    if FORM.PADDED:
        own_dz = tl.where(step.alive[:, None], own_dz, 0.0).to(own_dz.dtype)
        store_rows(dz, row, n, own_dz, there, FORM.WIDTH, FORM.LIMIT)
        if previous_states is not None:
            nothing = zeros(own_dz.dtype, FORM)
            store_rows(
                previous_states, row, n, nothing, there & ~step.alive, FORM.WIDTH, FORM.LIMIT
            )
    else:
        store_rows(dz, row, n, own_dz, step.alive, FORM.WIDTH, FORM.LIMIT)


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad_output,  # (N, directions * H), or None for zeros
    grad_h_n,  # (directions, B, H), or None for zeros
    weight_hh,  # (H, H)
    weight_hh_reverse,  # (H, H), weight_hh of the second direction, or None
    hx,  # (directions, B, H), or None for zeros
    output,  # (N, directions * H)
    dz,  # (N, directions * H): the gradient of the pre-activations
    previous_states,  # (N, directions * H): h_{t-1} of each row, or None if not needed
    dz_first,  # (directions, B, H): dz of the first steps, or None if grad_hx is None
    grad_hx,  # (directions, B, H), or None if not needed; the caller adds dz_first W_hh
    layout,  # this and all further arguments are as in forward_kernel
    arrivals,
    T,
    B,
    N,
    time_stride,
    batch_stride,
    reset_time_stride,
    reset_batch_stride,
    FORM: tl.constexpr,
):
    """Computes a layer's dz, last step first: dz_t = (grad_output_t + dz_{t+1} W_hh) act'(h_t)."""
    strides = (time_stride, batch_stride, reset_time_stride, reset_batch_stride)
    program = begin(layout, T, B, N, strides, True, FORM)
    dtype: tl.constexpr = output.dtype.element_ty
    right = of_direction(weight_hh, weight_hh_reverse, program, FORM)
    columns, of_states = offsets_of_direction(program, FORM)
    output += columns
    dz += columns
    previous_states = None if previous_states is None else previous_states + columns
    grad_output = None if grad_output is None else grad_output + columns
    grad_h_n = None if grad_h_n is None else grad_h_n + of_states
    hx = None if hx is None else hx + of_states
    dz_first = None if dz_first is None else dz_first + of_states
    grad_hx = None if grad_hx is None else grad_hx + of_states

    t = time_of(0, program)
    row = row_at(t, layout, program)
    later_row = row_at(t, layout, program)
    kept_dz = None  # dz of the later step, if it is kept on chip
    if FORM.KEEP_WEIGHT:
        n = units(0, program, FORM)
        right = kept_tile(right, n, False, FORM)
        upcoming = _inputs(output, grad_output, row, t < program.length, n, FORM)
    if FORM.KEEP_STATE:
        kept_dz = zeros(dtype, FORM)

    for s in tl.range(0, program.steps, num_stages=1):
        t = time_of(s, program)
        step = step_at(t, layout, program, FORM)
        receives = step.goes_on & ~step.is_cut
        earlier_t = time_of(s + 1, program)
        earlier_row = row_at(earlier_t, layout, program)
        source = earlier_row if FORM.KEEP_WEIGHT else row
        there = earlier_t < program.length if FORM.KEEP_WEIGHT else step.alive
        for i in range(FORM.TILES):
            n = units(i, program, FORM)
            inputs = _inputs(output, grad_output, source, there, n, FORM)
            if FORM.KEEP_WEIGHT:  # The weights stay on chip, so prefetch the next step's inputs.
                inputs, upcoming = upcoming, inputs
            h, grad = inputs
            grad = grad.to(tl.float32)
            if grad_h_n is not None:
                grad_last = load_rows(grad_h_n, program.b, n, step.begins, FORM.H, FORM.LIMIT)
                grad += grad_last.to(tl.float32)
            later_dz = dz + later_row * FORM.WIDTH
            grad = _add_product(grad, kept_dz, later_dz, receives, right, n, FORM)
            own_dz = activation_backward(grad, h.to(tl.float32), FORM).to(dtype)
            if FORM.KEEP_STATE:
                kept_dz = tl.where(step.alive[:, None], own_dz, kept_dz)
            h = tl.where(receives[:, None], h, 0.0).to(dtype)
            _store(previous_states, dz, later_row, row, n, h, own_dz, step, program, FORM)
        later_row = row
        row = earlier_row
        if not FORM.KEEP_STATE:
            meet(arrivals, s, program, FORM)

    _finish(kept_dz, hx, grad_h_n, dz, previous_states, dz_first, grad_hx, layout, program, FORM)
