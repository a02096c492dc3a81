"""The recurrent product of a step: states or dz times weight_hh, kept on chip or streamed."""

import triton
import triton.language as tl

from .primitives import zeros


@triton.jit
def _tile(weight, k, n, TRANSPOSED: tl.constexpr, FORM: tl.constexpr):
    """Loads rows k and columns n of a weight (H, H), or of its transpose."""
    place = n * FORM.H + k if TRANSPOSED else k * FORM.H + n
    tile = tl.load(weight + place, mask=(k < FORM.H) & (n < FORM.H), other=0.0)
    return _operand(tile, FORM)


@triton.jit
def round_to_tf32(x):
    """Rounds float32 to the nearest TF32 value, ties away from zero.

    Without this rounding, tensor cores would truncate the last 13 bits of their operands. NaN,
    infinity and numbers that would round to infinity are unchanged. In CUDA's NaN, all bits except
    the sign are set, so the addition would carry into the sign.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(tl.abs(x) < 3.4e38, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _operand(x, FORM: tl.constexpr):
    """Rounds an operand of tensor cores to TF32 if the precision is TF32."""
    if FORM.PRECISION == "tf32" and FORM.BLOCK_B > 1:
        x = round_to_tf32(x)
    return x


# A program with one sequence multiplies without tensor cores. Vectors of units k are split into
# elements. With this layout Triton assigns whole vectors to a thread and distributes lanes along
# the units n. So each thread computes most of a sum alone, for any alignment of rows. The
# multiply-adds within a thread are explicit. If lanes exchanged single products, the compiler would
# fuse each lane's own product with the rounded product of another lane, and the lanes' copies of
# the same sum would differ in their last bits.


@triton.jit
def _units_of_one(FORM: tl.constexpr):
    """Returns the indices of all units k, grouped in vectors: [K / VECTOR, 1, VECTOR]."""
    blocks = tl.arange(0, FORM.BLOCK_K // FORM.VECTOR) * FORM.VECTOR
    return blocks[:, None, None] + tl.arange(0, FORM.VECTOR)[None, None, :]


@triton.jit
def _apart(vectors, FORM: tl.constexpr):
    """Splits [K / VECTOR, N, VECTOR] into 2 float32 tensors [K / 2, N], or into 8 [K / 8, N].

    If VECTOR is 4, the halves of K are split too, so that a thread needs registers for fewer sums.
    """
    vectors = vectors.to(tl.float32)
    if FORM.VECTOR == 2:
        tensors = tl.split(vectors)
    else:
        shape: tl.constexpr = (2, vectors.shape[0] // 2, vectors.shape[1], 2, 2)
        halves = tl.permute(tl.reshape(vectors, shape), (1, 2, 3, 4, 0))
        first, second = tl.split(halves)
        tensors = _four_apart(first) + _four_apart(second)
    return tensors


@triton.jit
def _four_apart(vectors):
    """Splits vectors [K, N, 2, 2] into four tensors [K, N], one per vector element."""
    even, odd = tl.split(vectors)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _every_other(left, right, FIRST: tl.constexpr):
    """Returns the sum of left[i] * right[i] over every other i from FIRST to 7."""
    sum = left[FIRST] * right[FIRST]
    for i in tl.static_range(FIRST + 2, 8, 2):
        sum = tl.fma(left[i], right[i], sum)
    return sum


@triton.jit
def _product_of_one(left, right, sum, FORM: tl.constexpr):
    """Returns sum [1, N] + vectors [K / VECTOR, N, VECTOR] times a tile split by `_apart`."""
    left = _apart(left, FORM)
    if FORM.VECTOR == 2:
        terms = tl.fma(left[1], right[1], left[0] * right[0])
    else:
        terms = _every_other(left, right, 0) + _every_other(left, right, 1)
    return sum + tl.sum(terms, axis=0)[None, :]


@triton.jit
def product(left, right, sum, FORM: tl.constexpr):
    """Returns sum [B, N] + left [B, K] times a tile of weight_hh on chip."""
    if FORM.BLOCK_B == 1:
        left = tl.reshape(left, (FORM.BLOCK_K // FORM.VECTOR, 1, FORM.VECTOR))
        sum = _product_of_one(left, right, sum, FORM)
    else:
        sum = tl.dot(_operand(left, FORM), right, sum, input_precision=FORM.PRECISION)
    return sum


# Warps divide the units n of a tile of weight_hh among themselves. With few units n, every warp
# would hold a copy of the tile. So the sum over the units k is split into PARTS, and the warps
# divide these parts too.


@triton.jit
def kept_tile(weight, n, TRANSPOSED: tl.constexpr, FORM: tl.constexpr):
    """Loads columns n of a weight (H, H), or of its transpose, to keep on chip.

    The shape of the tile is [K, N], or [PARTS, K / PARTS, N] with several parts. For one sequence,
    `_apart` splits the tile.
    """
    if FORM.BLOCK_B == 1:
        tile = _tile(weight, _units_of_one(FORM), n[None, :, None], TRANSPOSED, FORM)
        tile = _apart(tile, FORM)
    elif FORM.PARTS == 1:
        tile = _tile(weight, tl.arange(0, FORM.BLOCK_K)[:, None], n[None, :], TRANSPOSED, FORM)
    else:
        part = tl.arange(0, FORM.PARTS) * (FORM.BLOCK_K // FORM.PARTS)
        k = part[:, None, None] + tl.arange(0, FORM.BLOCK_K // FORM.PARTS)[None, :, None]
        tile = _tile(weight, k, n[None, None, :], TRANSPOSED, FORM)
    return tile


@triton.jit
def load_states(states, mask, FORM: tl.constexpr):
    """Loads all units of the states, as [B, K], or as [PARTS, B, K / PARTS] with several parts.

    For one sequence, if H is a multiple of VECTOR, the result is [K / VECTOR, N, VECTOR], with
    equal values for all n. Each thread then loads all states that it multiplies, which is faster
    than exchanging states.
    """
    if FORM.BLOCK_B == 1 and FORM.H % FORM.VECTOR == 0:
        k = _units_of_one(FORM)
        everywhere = tl.arange(0, FORM.BLOCK_N)[None, :, None] * 0
        place, mask = states[:, None, None] + k + everywhere, mask[:, None, None]
    elif FORM.PARTS == 1:
        k = tl.arange(0, FORM.BLOCK_K)[None, :]
        place, mask = states[:, None] + k, mask[:, None]
    else:
        part = tl.arange(0, FORM.PARTS) * (FORM.BLOCK_K // FORM.PARTS)
        k = part[:, None, None] + tl.arange(0, FORM.BLOCK_K // FORM.PARTS)[None, None, :]
        place, mask = states[None, :, None] + k, mask[None, :, None]
    if FORM.H % FORM.BLOCK_K != 0:
        mask = mask & (k < FORM.H)
    return tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def product_of_states(left, right, sum, FORM: tl.constexpr):
    """Returns sum [B, N] + states (from `load_states`) times a tile of weight_hh on chip."""
    if FORM.BLOCK_B == 1 and FORM.H % FORM.VECTOR == 0:
        sum = _product_of_one(left, right, sum, FORM)
    elif FORM.PARTS == 1:
        sum = product(left, right, sum, FORM)
    else:
        left = _operand(left, FORM)
        sum += tl.sum(tl.dot(left, right, input_precision=FORM.PRECISION), axis=0)
    return sum


@triton.jit
def streamed_product(
    states,
    mask,
    weight,
    n,
    sum,
    TRANSPOSED: tl.constexpr,
    FORM: tl.constexpr,
):
    """Returns sum [B, N] + states [B, H] times weight_hh, both read block by block.

    Without tensor cores `tl.dot` computes each sum as a chain of multiply-adds. The rounding error
    of a chain grows with its length, so each chain joins the sum after 64 multiply-adds.
    """
    CHAINED: tl.constexpr = FORM.PRECISION == "ieee" and states.dtype.element_ty == tl.float32
    chain = zeros(tl.float32, FORM)
    for start in tl.range(0, FORM.H, FORM.BLOCK_K, num_stages=FORM.STAGES):
        k = start + tl.arange(0, FORM.BLOCK_K)
        some = (
            mask[:, None] if FORM.H % FORM.BLOCK_K == 0 else mask[:, None] & (k[None, :] < FORM.H)
        )
        left = tl.load(states[:, None] + k[None, :], mask=some, other=0.0, cache_modifier=".cg")
        right = _tile(weight, k[:, None], n[None, :], TRANSPOSED, FORM)
        if CHAINED:
            chain = product(left, right, chain, FORM)
            if (start + FORM.BLOCK_K) % 64 == 0:
                sum += chain
                chain = zeros(tl.float32, FORM)
        else:
            sum = product(left, right, sum, FORM)
    return sum + chain if CHAINED else sum
