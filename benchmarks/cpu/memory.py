"""Measures the peak memory of training steps, for the table of `make bench`."""

import ctypes
import gc
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.harness.grid import ROLES, TRAINING, Workload
from benchmarks.harness.peak import peak_above
from benchmarks.harness.study import draw_input
from namernn_fast.bench.timed_calls import call_of, draw_gradients, equal_layers


def return_freed_memory() -> None:
    """Returns freed memory to the system: a call that reuses it would not raise the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def peak_of_training(
    workload: Workload, role: str, threads: int, lengths: Sequence[int] = ()
) -> int:
    """Returns the bytes by which a training step raises the peak of this process.

    The parameters, the input and the gradients of the results exist before the step. A step on one
    sequence first starts the threads and loads the code, which would count otherwise.
    """
    torch.set_num_threads(threads)
    layer = equal_layers(workload)[getattr(workload.layers, role)]
    small, input = torch.randn(2, 1, workload.input_size), draw_input(workload, lengths)
    warm_up, step = (call_of(layer, x, TRAINING, draw_gradients(layer, x)) for x in (small, input))
    warm_up()
    layer.zero_grad()
    return_freed_memory()
    return peak_above(step)


@contextmanager
def processes() -> Iterator[dict[str, Executor]]:
    """Yields an executor for each role: a new process that runs only the steps of that layer."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for role in ROLES
        }


def peaks_of_training(
    workload: Workload, threads: int, lengths: Sequence[int], executors: Mapping[str, Executor]
) -> dict[str, int]:
    """Returns the peak bytes of both layers by role, each measured by the executor of its role."""
    tasks = {
        role: executor.submit(peak_of_training, workload, role, threads, lengths)
        for role, executor in executors.items()
    }
    return {role: task.result() for role, task in tasks.items()}
