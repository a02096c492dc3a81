"""Sums of rows by token."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["V"])
def sums_by_token_kernel(
    rows,  # (N, WIDTH)
    order,  # (N), row indices sorted by token
    borders,  # (V + 1): the rows of token v are order[borders[v]:borders[v + 1]]
    sums,  # (parts, V, WIDTH), float32
    V,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows read at once
    STAGES: tl.constexpr,
):
    """Computes the partial sums of each token's rows.

    The grid is (V, blocks of units, P parts). Part p adds the blocks of rows p, p + P, ...
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
