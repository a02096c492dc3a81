"""A matrix product in float32, in a precision of its own.

Shapes are written in brackets: M and N are blocks of the rows and the columns of the product, K a
block of what is summed over.
"""

import triton
import triton.language as tl

from .primitives import round_to_tf32


@triton.jit
def product_kernel(
    left,  # (M, K)
    right,  # (K, N)
    plus,  # (M, N), or None: zeros
    out,  # (parts, M, N), contiguous
    M,
    N,
    K,
    K_OF_A_PART,  # a multiple of BLOCK_K
    left_stride_m,
    left_stride_k,
    right_stride_k,
    right_stride_n,
    plus_stride_m,
    plus_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,  # ieee or tf32
):
    """Computes out = left right + plus, with the sum over K in parts.

    Programs lie in a grid (blocks, parts).
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = (tile // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = part.to(tl.int64) * K_OF_A_PART
    end = tl.minimum(begin + K_OF_A_PART, K)
    left_rows = left + m[:, None] * left_stride_m
    right_columns = right + n[None, :].to(tl.int64) * right_stride_n
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        mask = (m[:, None] < M) & (k[None, :] < end)
        a = tl.load(left_rows + k[None, :] * left_stride_k, mask=mask, other=0.0)
        mask = (k[:, None] < end) & (n[None, :] < N)
        b = tl.load(right_columns + k[:, None] * right_stride_k, mask=mask, other=0.0)
        if PRECISION == "tf32":
            a, b = round_to_tf32(a), round_to_tf32(b)
        sum = tl.dot(a, b, sum, input_precision=PRECISION)
    mask = (m[:, None] < M) & (n[None, :] < N)
    if plus is not None:
        place = m[:, None] * plus_stride_m + n[None, :] * plus_stride_n
        sum += tl.load(plus + place, mask=mask, other=0.0)
    tl.store(out + (part.to(tl.int64) * M + m[:, None]) * N + n[None, :], sum, mask=mask)
