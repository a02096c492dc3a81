"""Plans of every kind for the interpreter, for any hidden size, with or without a remainder."""

import triton

from namernn_fast.gpu.plan import Plan


def resident(hidden_size):
    whole = max(16, triton.next_power_of_2(hidden_size))
    return Plan(16, whole, whole, 1, 1, 1, 4, 1, "ieee")


def resident_one_sequence(hidden_size):
    return resident(hidden_size)._replace(block_b=1)


def cooperative(hidden_size):
    """Returns a plan with two members and two parts, unless one block holds all hidden units."""
    whole = resident(hidden_size).block_k
    half = max(16, whole // 2)
    members = triton.cdiv(hidden_size, half)
    return Plan(16, half, whole, members, 1, min(2, members), 4, 1, "ieee")


def cooperative_one_sequence(hidden_size):
    return cooperative(hidden_size)._replace(block_b=1, parts=1)


def streamed(hidden_size):
    return Plan(16, 16, 16, 1, triton.cdiv(hidden_size, 16), 1, 4, 2, "ieee")


def streamed_by_two(hidden_size):
    tiles = triton.cdiv(hidden_size, 16)
    members = min(2, tiles)
    return Plan(16, 16, 16, members, triton.cdiv(tiles, members), 1, 4, 2, "ieee")


PLANS = {
    plan.__name__: plan
    for plan in (
        *(resident, resident_one_sequence, cooperative, cooperative_one_sequence),
        *(streamed, streamed_by_two),
    )
}
