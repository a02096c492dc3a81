"""A float32 matrix product that ignores torch's setting for the precision of products."""

import triton
import triton.language as tl

from .recurrent_product import round_to_tf32


@triton.jit
def product_kernel(
    left,  # (M, K)
    right,  # (K, N)
    plus,  # (M, N), or None for zeros
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
    WIDE: tl.constexpr,  # whether an offset within a block can reach 2^31
):
    """Computes out = left @ right + plus; the grid is (blocks, parts).

    Each part sums a slice of K into a separate matrix of `out`. If there are several parts,
    `plus` must be None, and the caller sums the parts and adds `plus`.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_m, first_n = (tile // blocks_n).to(tl.int64) * BLOCK_M, tile % blocks_n * BLOCK_N
    begin = part.to(tl.int64) * K_OF_A_PART
    end = tl.minimum(begin + K_OF_A_PART, K)
    # Offsets within a block take half as many registers as addresses, and are loop-invariant.
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_m, is_n = (m < M - first_m)[:, None], (n < N - first_n)[None, :]
    if WIDE:
        m, n, k = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
    left += first_m * left_stride_m
    right += first_n.to(tl.int64) * right_stride_n
    left_place = m[:, None] * left_stride_m + k[None, :] * left_stride_k
    right_place = k[:, None] * right_stride_k + n[None, :] * right_stride_n
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        is_k = k < end - start
        a = tl.load(left + start * left_stride_k + left_place, mask=is_m & is_k[None, :], other=0.0)
        b = tl.load(
            right + start * right_stride_k + right_place, mask=is_k[:, None] & is_n, other=0.0
        )
        if PRECISION == "tf32":
            a, b = round_to_tf32(a), round_to_tf32(b)
        sum = tl.dot(a, b, sum, input_precision=PRECISION)
    m, n = m.to(tl.int64)[:, None] + first_m, n[None, :] + first_n
    if plus is not None:
        sum += tl.load(plus + m * plus_stride_m + n * plus_stride_n, mask=is_m & is_n, other=0.0)
    tl.store(out + (part.to(tl.int64) * M + m) * N + n, sum, mask=is_m & is_n)
