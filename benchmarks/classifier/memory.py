"""Measures the peak memory of calls, each in a fresh process.

A small call first starts the threads and loads the code, which would count otherwise.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.classifier.effort import Effort
from benchmarks.classifier.made_up import Imitation
from benchmarks.classifier.program import Corpus, Program, starting_weights
from benchmarks.classifier.rivals import PROGRAMS
from benchmarks.harness.peak import peak_above
from benchmarks.harness.processes import in_new_process

TRAINING, LABELS = "training", "labels"


def of_training(
    program_class: type[Program], threads: int, batch_size: int, most: int | None
) -> int:
    """Returns the peak bytes of two training steps."""
    torch.set_num_threads(threads)
    corpus = Corpus.of_data(most)
    program = program_class(corpus, starting_weights(len(corpus.languages)))
    order = torch.arange(min(2 * batch_size, len(corpus.names)))
    program.train(program.batches(order[:8], 4))
    return peak_above(lambda: program.train(program.batches(order, batch_size)))


def of_labels(program_class: type[Program], threads: int, count: int, most: int | None) -> int:
    """Returns the peak bytes of labelling `count` names."""
    torch.set_num_threads(threads)
    corpus = Corpus.of_data(most)
    program = program_class(corpus, starting_weights(len(corpus.languages)))
    names = Imitation(corpus.names).draw(count)
    program.label(names[:8])
    return peak_above(lambda: program.label(names))


def measure(threads: int, effort: Effort) -> list[dict[str, Any]]:
    """Returns a row for each task and program."""
    tasks: list[tuple[dict[str, Any], Callable[..., int], tuple]] = []
    largest = max(effort.batches)
    for program_class in PROGRAMS:
        row = {"task": TRAINING, "size": largest, "who": program_class.name}
        tasks.append((row, of_training, (program_class, threads, largest, effort.corpus)))
        row = {"task": LABELS, "size": effort.fewer, "who": program_class.name}
        tasks.append((row, of_labels, (program_class, threads, effort.fewer, effort.corpus)))
    if not effort.fresh:
        return [{**row, "bytes": task(*arguments)} for row, task, arguments in tasks]
    # Measure in parallel: importing torch takes most of the time, and processes do not affect each
    # other's memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda task: in_new_process(task[1], *task[2]), tasks)
        return [{**row, "bytes": size} for (row, *_), size in zip(tasks, found, strict=True)]
