"""Measures the peak memory of both programs, each task in a new process."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.harness.peak import peak_above
from benchmarks.harness.processes import in_new_process
from benchmarks.names.data import Corpus
from benchmarks.names.programs import PROGRAMS, Program, starting_weights

TRAINING, LABELS = "training", "labels"


def peak_of(
    program_class: type[Program],
    task: str,
    size: int,
    corpus: Corpus,
    names: Sequence[str],
    threads: int,
) -> int:
    """Returns how many bytes a task with `size` names adds to this process's peak memory use.

    Training takes two steps. A small warm-up call starts threads and loads code before that.
    """
    torch.set_num_threads(threads)
    program = program_class(corpus, starting_weights(len(corpus.languages)))

    def call(size: int) -> None:
        if task == TRAINING:
            program.train(program.batches(torch.arange(2 * size), size))
        else:
            program.label(names[:size])

    call(4)
    return peak_above(lambda: call(size))


def measure(
    corpus: Corpus, batch_size: int, names: Sequence[str], threads: int
) -> list[dict[str, Any]]:
    """Returns a row with the peak memory for each task and program."""
    sizes = {TRAINING: batch_size, LABELS: len(names)}
    tasks = [(program, task, size) for program in PROGRAMS for task, size in sizes.items()]
    # Measure in parallel: importing torch takes most of the time, and processes do not affect each
    # other's memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        peaks = pool.map(lambda it: in_new_process(peak_of, *it, corpus, names, threads), tasks)
        return [
            {"task": task, "size": size, "who": program.name, "bytes": peak}
            for (program, task, size), peak in zip(tasks, peaks, strict=True)
        ]
