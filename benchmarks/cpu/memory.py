"""Measures the peak memory of training steps, for the table of `make bench`."""

import ctypes
import gc
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache

import torch

from benchmarks.harness.grid import TRAINING, Workload
from benchmarks.harness.peak import peak_above
from benchmarks.harness.study import draw_input
from namernn_fast.bench.timed_calls import call_of, draw_gradients, equal_layers


def return_freed_memory() -> None:
    """Returns freed memory to the system, because a call that reuses it does not raise the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def peak_of_training(
    workload: Workload, layer_name: str, threads: int, lengths: Sequence[int] = ()
) -> int:
    """Returns how many bytes a training step adds to this process's peak memory use.

    The parameters, the input and the gradients of the results exist before the step. A warm-up step
    on one sequence starts the threads and loads the code, so that these do not count.
    """
    torch.set_num_threads(threads)
    layer = equal_layers(workload)[layer_name]
    small, input = torch.randn(2, 1, workload.input_size), draw_input(workload, lengths)
    warm_up, step = (call_of(layer, x, TRAINING, draw_gradients(layer, x)) for x in (small, input))
    warm_up()
    layer.zero_grad()
    return_freed_memory()
    return peak_above(step)


@cache
def process_of(layer: str) -> Executor:
    """Returns an executor with one new process, which runs only the steps of one layer."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def peaks_of_training(workload: Workload, threads: int, lengths: Sequence[int]) -> dict[str, int]:
    """Returns the peak bytes of both layers by name, each measured in a separate process."""
    tasks = {
        layer: process_of(layer).submit(peak_of_training, workload, layer, threads, lengths)
        for layer in workload.layers
    }
    return {layer: task.result() for layer, task in tasks.items()}
