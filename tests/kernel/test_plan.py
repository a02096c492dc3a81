"""The plan of the CPU kernel on machines with any number of cores."""

import pytest
from cases import CELLS

from namernn_fast.ops import cpu_plan

SHAPES = [  # input_size, hidden_size, seq_len, batch
    (64, 64, 8, 1),
    (64, 64, 8, 16),
    (64, 256, 8, 1024),
    (128, 128, 128, 1),
    (512, 512, 128, 32),
    (1024, 1024, 64, 64),
    (1024, 4096, 100, 1),
]


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 32, 96])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_more_threads_never_take_longer(cell, shape, threads):
    input_size, hidden_size, seq_len, batch = shape
    plan = cpu_plan([batch] * seq_len, input_size, hidden_size, threads, cell=cell)
    alone = cpu_plan([batch] * seq_len, input_size, hidden_size, 1, cell=cell)
    assert (alone.groups, alone.members) == (1, 1)
    assert 1 <= plan.groups <= batch
    assert plan.groups * plan.members <= threads
    assert plan.nanoseconds <= alone.nanoseconds


def test_small_work_stays_on_one_thread():
    assert cpu_plan([1] * 8, 64, 64, 96)[:2] == (1, 1)


def test_the_weights_of_all_gates_count():
    """A GRU has three times as many weights, so smaller batches are worth dividing."""
    sizes = ([4] * 8, 64, 64)
    assert cpu_plan(*sizes, 1, cell="gru").nanoseconds == 3 * cpu_plan(*sizes, 1).nanoseconds
    assert cpu_plan(*sizes, 2).members * cpu_plan(*sizes, 2).groups == 1
    assert cpu_plan(*sizes, 2, cell="gru").groups == 2


def test_many_sequences_share_out_the_batch():
    assert cpu_plan([1024] * 8, 64, 256, 2)[:2] == (2, 1)
    assert cpu_plan([1024] * 8, 64, 256, 32)[:2] == (32, 1)


def test_one_long_sequence_shares_out_the_hidden_units():
    plan = cpu_plan([1] * 128, 1024, 4096, 8)
    assert plan.groups == 1
    assert plan.members == 8


def test_few_sequences_on_many_threads_share_out_both():
    plan = cpu_plan([16] * 128, 512, 1024, 64)
    assert plan.groups > 1
    assert plan.members > 1


def test_weights_larger_than_the_l2_cache_are_split():
    """Threads divide the weights if half of them fits in a core's L2 cache but not all."""
    assert cpu_plan([64] * 64, 512, 512, 2, l2_bytes=3 * 2**19).members == 2
    assert cpu_plan([64] * 64, 512, 512, 2, l2_bytes=2**23).members == 1


def test_a_packed_batch_counts_the_rows_that_exist():
    whole = cpu_plan([256] * 12, 64, 256, 2)
    packed = cpu_plan([256] * 2 + [1] * 10, 64, 256, 2)
    assert packed.nanoseconds < whole.nanoseconds / 3


def test_a_plan_without_steps():
    assert cpu_plan([], 4, 4, 8)[:2] == (1, 1)


def test_layers_run_at_once_if_each_has_little_to_divide():
    assert cpu_plan([1] * 500, 64, 64, 2, num_layers=2).layers == 2
    assert cpu_plan([1] * 500, 64, 64, 8, num_layers=6).layers == 6
    assert cpu_plan([1] * 500, 64, 64, 1, num_layers=6).layers == 1
    assert cpu_plan([1] * 16, 64, 64, 8, num_layers=6).layers == 1
    assert cpu_plan([512] * 500, 64, 64, 2, num_layers=2).layers == 1
