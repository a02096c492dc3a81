"""Times several calls of each workload in turn, and publishes their medians."""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.harness import pages
from benchmarks.harness.grid import FORWARD, Workload
from namernn_fast import ops
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import TimedCall, race
from namernn_fast.bench.tables import duration


def rows_of(
    workloads: Iterable[Workload],
    calls: Callable[[Workload], dict[str, TimedCall]],
    options: argparse.Namespace,
    pause: float = 0.0,
) -> list[dict[str, Any]]:
    """Times the calls of every workload; returns a row with their medians for each workload."""
    rows = []
    budget = pages.time_budget(options, max_rounds=20)
    for workload in pages.chosen(workloads, options):
        with torch.inference_mode(workload.mode == FORWARD):
            rounds = race(calls(workload), budget, pause)
        medians = {name: statistics.median(r.seconds) for name, r in rounds.items()}
        rows.append({**dataclasses.asdict(workload), "medians": medians})
        print(workload, *(f"{name} {duration(value)}" for name, value in medians.items()))
    return rows


def run(
    name: str,
    description: str,
    workloads: Iterable[Workload],
    calls: Callable[[Workload], dict[str, TimedCall]],
    report: Callable[[dict[str, Any]], str],
    pause: float = 0.0,
) -> None:
    """Runs a program that compares types of numbers: times all workloads and publishes the report.

    Args:
        name: The name of the results.
        description: The program's description on the command line.
        workloads: The workloads.
        calls: Returns the calls of a workload, by name.
        report: Returns the text for the recorded document.
        pause: Seconds before each round; see `race`.
    """
    options = pages.parse(pages.parser(description, seconds=0.5))
    pages.settle(options.threads)

    rows = rows_of(workloads, calls, options, pause)
    document = {"cpu": cpu_name(), "threads": options.threads, "rows": rows}
    document["bfloat16"] = f"cpu {ops.cpu_kernel(torch.bfloat16)}"
    pages.publish(name, document, report(document), options.record)
