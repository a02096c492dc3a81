"""Plans for Triton's interpreter. They work for any hidden size.

The interpreter runs one program after another, so in these plans no program waits for another.
"""

import triton

from namernn_fast.gpu.plan import Plan


def resident(hidden_size):
    whole = max(16, triton.next_power_of_2(hidden_size))
    return Plan(16, whole, whole, warps=4)


def resident_one_sequence(hidden_size):
    return resident(hidden_size)._replace(block_b=1)


def streamed(hidden_size):
    return Plan(16, 16, 16, warps=4, tiles=triton.cdiv(hidden_size, 16), stages=2)


PLANS = (resident, resident_one_sequence, streamed)
