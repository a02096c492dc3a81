"""The peak memory of a training step of a cell, for the table of `make bench`."""

import ctypes
import gc
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness.grid import ROLES, TRAINING, Cell
from benchmarks.harness.peak import peak_above
from namernn_fast.bench.workload import Input, call_of, draw_gradients, equal_layers


def draw_input(cell: Cell, lengths: Sequence[int] = ()) -> Input:
    """Returns a dense time-major input, or a packed one with these lengths."""
    torch.manual_seed(1)
    steps = cell.seq_len or max(lengths)
    input = torch.randn(steps, cell.batch, cell.input_size)
    return pack_padded_sequence(input, lengths, enforce_sorted=False) if lengths else input


def return_freed_memory() -> None:
    """Returns freed memory to the system, so that a call cannot take it without being counted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def peak_of_training(cell: Cell, role: str, threads: int, lengths: Sequence[int] = ()) -> int:
    """Returns the bytes by which a training step raises the peak of this process.

    Parameters, input and given gradients exist before the step. A step of one row first starts the
    threads and loads the code, which would count otherwise.

    Args:
        cell: The cell.
        role: "baseline" or "fused".
        threads: The number of threads.
        lengths: The lengths of a packed batch.
    """
    torch.set_num_threads(threads)
    layer = equal_layers(cell)[getattr(cell.layers, role)]
    small, input = torch.randn(2, 1, cell.input_size), draw_input(cell, lengths)
    warm_up, step = (
        call_of(layer, given, TRAINING, draw_gradients(layer, given)) for given in (small, input)
    )
    warm_up()
    layer.zero_grad()
    return_freed_memory()
    return peak_above(step)


@contextmanager
def processes() -> Iterator[dict[str, Executor]]:
    """Yields a new process for each layer by role, in which nothing but its steps runs."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield {
            role: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for role in ROLES
        }


def peaks_of_training(
    cell: Cell, threads: int, lengths: Sequence[int], executors: Mapping[str, Executor]
) -> dict[str, int]:
    """Returns the peak bytes of both layers by role, each measured by the executor of its role."""
    tasks = {
        role: executor.submit(peak_of_training, cell, role, threads, lengths)
        for role, executor in executors.items()
    }
    return {role: task.result() for role, task in tasks.items()}
