"""Tests how the CPU kernel's plan divides the work among threads."""

import pytest
from cases import CELLS
from kinds import KINDS

from namernn_fast.nn.inference import direct
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
def test_the_plan_for_more_threads_is_never_estimated_to_be_slower(cell, shape, threads):
    input_size, hidden_size, seq_len, batch = shape
    plan = cpu_plan([batch] * seq_len, input_size, hidden_size, threads, cell=cell)
    alone = cpu_plan([batch] * seq_len, input_size, hidden_size, 1, cell=cell)
    assert (alone.groups, alone.members) == (1, 1)
    assert 1 <= plan.groups <= batch
    assert plan.groups * plan.members <= threads
    assert plan.nanoseconds <= alone.nanoseconds


@pytest.mark.parametrize(
    ("batch_sizes", "input_size", "hidden_size", "threads", "groups", "members"),
    [
        pytest.param([1] * 8, 64, 64, 96, 1, 1, id="small problem"),
        pytest.param([], 4, 4, 8, 1, 1, id="no steps"),
        pytest.param([1024] * 8, 64, 256, 2, 2, 1, id="many sequences"),
        pytest.param([1024] * 8, 64, 256, 32, 32, 1, id="many sequences and threads"),
        pytest.param([1] * 128, 1024, 4096, 8, 1, 8, id="hidden units of one long sequence"),
    ],
)
def test_the_plan_divides_sequences_or_hidden_units_among_threads(
    batch_sizes, input_size, hidden_size, threads, groups, members
):
    plan = cpu_plan(batch_sizes, input_size, hidden_size, threads)
    assert (plan.groups, plan.members) == (groups, members)


def test_the_plan_counts_the_weights_of_all_gates():
    """A GRU has three times the weights of a vanilla RNN, so the plan divides smaller batches."""
    sizes = ([4] * 8, 64, 64)
    assert cpu_plan(*sizes, 1, cell="gru").nanoseconds == 3 * cpu_plan(*sizes, 1).nanoseconds
    assert cpu_plan(*sizes, 2).members * cpu_plan(*sizes, 2).groups == 1
    assert cpu_plan(*sizes, 2, cell="gru").groups == 2


def test_the_plan_for_many_threads_divides_sequences_and_hidden_units():
    plan = cpu_plan([16] * 128, 512, 1024, 64)
    assert plan.groups > 1
    assert plan.members > 1


def test_weights_larger_than_the_l2_cache_are_divided_between_threads():
    """Two threads divide the weights if half of the weights, but not all, fit in the L2 cache."""
    assert cpu_plan([64] * 64, 512, 512, 2, l2_bytes=3 * 2**19).members == 2
    assert cpu_plan([64] * 64, 512, 512, 2, l2_bytes=2**23).members == 1


def test_backward_passes_divide_many_sequences():
    """The weights exceed the L2 cache. Products with few rows cannot hide the time to read them."""
    sizes = 1024, 1024, 2, 2**20
    assert cpu_plan([64] * 64, *sizes, backward=True).groups == 2
    assert cpu_plan([8] * 64, *sizes, backward=True).members == 2
    assert cpu_plan([64] * 2, *sizes, backward=True).members == 2  # few rows to gain from


def test_the_weight_gradients_of_many_groups_take_little_memory():
    """The gradients of 64 groups would take 1 GiB, and dz of all rows takes 128 MiB."""
    assert 1 < cpu_plan([1024] * 8, 1024, 1024, 64, cell="lstm", backward=True).groups < 64


def test_the_plan_for_a_packed_batch_ignores_padding():
    whole = cpu_plan([256] * 12, 64, 256, 2)
    packed = cpu_plan([256] * 2 + [1] * 10, 64, 256, 2)
    assert packed.nanoseconds < whole.nanoseconds / 3


def test_layers_too_small_to_divide_run_concurrently():
    assert cpu_plan([1] * 500, 64, 64, 2, num_layers=2).layers == 2
    assert cpu_plan([1] * 500, 64, 64, 8, num_layers=6).layers == 6
    assert cpu_plan([1] * 500, 64, 64, 1, num_layers=6).layers == 1
    assert cpu_plan([1] * 16, 64, 64, 8, num_layers=6).layers == 1
    assert cpu_plan([512] * 500, 64, 64, 2, num_layers=2).layers == 1


AMD, INTEL = ("avx512", "avx512_bf16"), ("avx512", "amx")


@pytest.mark.parametrize(
    ("kernels", "cell", "batch", "hidden_size", "skips_dispatcher", "expected"),
    [
        (AMD, "gru", 16, 4096, True, True),
        (AMD, "gru", 17, 128, True, True),
        (AMD, "gru", 17, 129, True, False),
        (AMD, "gru", 2, 512, False, True),
        (AMD, "gru", 1, 4096, False, False),
        (AMD, "gru", 2, 128, False, False),
        (AMD, "rnn", 8, 4096, False, False),
        (INTEL, "gru", 8, 512, False, True),
        (INTEL, "gru", 17, 512, False, False),
        (INTEL, "gru", 8, 511, False, False),
        (("baseline", "baseline"), "gru", 8, 512, True, False),
    ],
)
def test_single_steps_run_the_kernel_where_it_is_faster(
    kernels, cell, batch, hidden_size, skips_dispatcher, expected, monkeypatch
):
    monkeypatch.setattr(direct, "KERNEL", kernels[0])
    monkeypatch.setattr(direct, "BFLOAT16_KERNEL", kernels[1])
    sizes = KINDS[cell].cell, batch, hidden_size, hidden_size
    assert direct.is_faster(*sizes, skips_dispatcher=skips_dispatcher) == expected
