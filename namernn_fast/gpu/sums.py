"""Sums the rows of each token, to compute the gradient of a table."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import launching
from .kernels import sums_by_token_kernel

_ROWS_OF_A_PART = 256  # Target for the average number of rows that a part adds per token.
SUMS_SETTINGS = {"num_warps": 4, "enable_fp_fusion": True}
"""Triton's compile and launch options for `sums_by_token_kernel`."""


def sums_constants_of(width: int) -> dict[str, Any]:
    """Returns the compile-time arguments of `sums_by_token_kernel` for rows of `width` features."""
    block = min(64, triton.next_power_of_2(width))
    return {"WIDTH": width, "BLOCK_N": block, "BLOCK_R": 32, "STAGES": 3}


def sums_by_token(rows: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    """Returns the sum of each token's rows, (vocabulary, features), added in a fixed order.

    For small vocabularies, torch's own `embedding_dense_backward` uses atomic additions, which have
    no fixed order, unless deterministic algorithms are enabled
    (https://github.com/pytorch/pytorch/pull/172454).

    Args:
        rows: the rows to add, (N, features), contiguous. Rows of padding must be zero.
        ids: the token id of each row, (N). Ids are not used as addresses, and rows whose id is out
            of range are not added.
        vocabulary: the number of tokens.
    """
    by_token, order = ids.to(torch.int32).sort(stable=True)
    tokens = torch.arange(vocabulary + 1, dtype=torch.int32, device=ids.device)
    borders = torch.searchsorted(by_token, tokens)
    width = rows.shape[1]
    parts = max(1, min(1024, len(ids) // (vocabulary * _ROWS_OF_A_PART)))
    sums = rows.new_empty(parts, vocabulary, width, dtype=torch.float32)
    constants = sums_constants_of(width)
    grid = (vocabulary, -(-width // constants["BLOCK_N"]), parts)
    arguments = {"rows": rows, "order": order, "borders": borders, "sums": sums, "V": vocabulary}
    launching.run(sums_by_token_kernel, grid, arguments | constants, SUMS_SETTINGS)
    return (sums.sum(0) if parts > 1 else sums[0]).to(rows.dtype)
