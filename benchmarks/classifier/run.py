"""Races programs of the names classifier: `python -m benchmarks.classifier.run [--record]`.

Two programs train and use the plain network: one as a user would write it with `nn.RNN` and
`DataLoader`, and the names application. First the gate checks their losses and labels against an
oracle.
"""

import argparse
import gc
import time
from typing import Any

import torch

from benchmarks.classifier import gate, labelling, memory, training
from benchmarks.classifier.effort import Effort, effort_of
from benchmarks.classifier.made_up import Imitation
from benchmarks.classifier.program import Corpus, starting_weights
from benchmarks.classifier.report import report
from benchmarks.classifier.rivals import PROGRAMS
from benchmarks.harness import pages, surnames
from namernn_fast.bench.machine import cpu_name

STARTED = time.perf_counter()


def announce(stage: str) -> None:
    """Prints the elapsed time and what is being measured."""
    print(f"{time.perf_counter() - STARTED:4.0f} s: {stage}", flush=True)


def run(options: argparse.Namespace, effort: Effort, wrong: list[str]) -> dict[str, Any]:
    """Checks and measures everything; returns the raw rows.

    A part with a failed check is not timed and is added to `wrong`: all epochs, or the labels for
    one number of threads.
    """
    corpus = Corpus.of_data(effort.corpus)
    effort = effort.within(len(corpus.names))
    start = starting_weights(len(corpus.languages))
    made_up = Imitation(corpus.names).draw(effort.many)
    document: dict[str, Any] = {"data": surnames.description(), "names": len(corpus.names)}
    document |= {"training": [], "labels": [], "memory": []}
    weights = start
    pages.settle(options.threads)
    batches: tuple[int, ...] = ()
    with pages.gated("epochs", wrong):
        for batch_size, steps in effort.gate.items():
            announce(f"checking {steps} losses, B = {batch_size}")
            weights = gate.check_losses(PROGRAMS, corpus, start, batch_size, steps)
        batches = effort.batches
    counts = {options.threads, 1} if effort.is_whole else {options.threads}
    for threads in sorted(counts, reverse=True):
        pages.settle(threads)
        for batch_size in batches:
            announce(f"epochs, B = {batch_size}, {threads} thread(s)")
            document["training"] += training.race_epochs(corpus, start, threads, batch_size, effort)
        with pages.gated(f"labels, {threads} thread(s)", wrong):
            announce(f"labels, {threads} thread(s)")
            programs = {program_class: program_class(corpus, weights) for program_class in PROGRAMS}
            gate.check_labels(programs, corpus, corpus.names[: effort.gate_labels])
            document["labels"] += labelling.race_labels(
                programs, corpus, corpus.names, threads, effort.budget
            )
            announce("labels of made-up names")
            names = made_up if threads == options.threads else made_up[: effort.fewer]
            document["labels"] += labelling.race_labels(
                programs, corpus, names, threads, budget=None
            )
    if effort.is_whole:
        announce("memory")
        document["memory"] = memory.measure(options.threads, effort)
    return document


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=2.0))
    # The garbage collector stays on, as in a user's program, but does not traverse all of torch.
    gc.collect()
    gc.freeze()
    machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    wrong: list[str] = []
    document = {"machine": machine, **run(options, effort_of(options), wrong)}
    pages.publish("classifier", document, report(document), options.record, wrong=wrong)


if __name__ == "__main__":
    main()
