"""Code shared by all benchmarks: options, process setup, and writing results.

Without `--record` a program writes its raw rows, its tables and its plots to `build/bench/`, which
git ignores. With `--record` it replaces the results in `benchmarks/results/` and the tables in the
documents. `--record avx2` does the same for the tables of runs with AVX2.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.paths import BUILT, RESULTS, ROOT, SCRATCH, Section, sections_of_avx2
from namernn_fast import ops
from namernn_fast.bench.race import QUICK, TimeBudget, keep_freed_memory
from namernn_fast.testing import BudgetError

ALL = "all"
"""The default value of `--record`."""
AVX2 = "avx2"
"""The value of `--record`, and the folder of results, of runs with AVX2."""
FAILED = "Checks that failed (their workloads were not timed):"


def parser(description: str, seconds: float | None = None) -> argparse.ArgumentParser:
    """Returns a parser for the options that all programs share.

    Args:
        description: The docstring of the program; its first line is shown.
        seconds: The default time per workload; None for a program that times nothing.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--record",
        nargs="?",
        const=ALL,
        default="",
        choices=(ALL, AVX2),
        help="replace the recorded results and the tables in docs, or only those of avx2",
    )
    if seconds is not None:
        parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
        parser.add_argument("--seconds", type=float, default=seconds, help="for each workload")
        parser.add_argument(
            "--quick", action="store_true", help="a trial run: small workloads and few short rounds"
        )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns the options. Exits if a run with these options cannot be recorded.

    Exits if `--record` is combined with `--quick` or passive waiting, and if `--record avx2` is
    combined with kernels of another instruction set.

    With passive waiting, threads sleep while they wait, and waking a thread takes longer than a
    small call. Passive waiting only makes sense on a shared machine.
    """
    options = parser.parse_args()
    if options.record and getattr(options, "quick", False):
        parser.error("a quick run is not a measurement and cannot be recorded")
    if options.record == AVX2 and ops.cpu_kernel() != AVX2:
        parser.error("set ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 to record avx2")
    if hasattr(options, "threads") and os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        slow = "OMP_WAIT_POLICY=passive makes small calls on several threads slow"
        if options.record:
            parser.error(f"{slow}: unset it to record results")
        print(f"{parser.prog}: {slow}: unset it to measure speed", file=sys.stderr)
    return options


def settle(threads: int) -> None:
    """Sets the number of threads, and keeps freed memory as a long-running process would."""
    torch.set_num_threads(threads)
    keep_freed_memory()


def time_budget(options: argparse.Namespace, max_rounds: int, round_seconds: float) -> TimeBudget:
    """Returns each workload's time budget, set by the options `--seconds` and `--quick`."""
    if options.quick:
        return QUICK
    return TimeBudget(options.seconds, max_rounds=max_rounds, round_seconds=round_seconds)


@contextmanager
def gated(checked: object, wrong: list[str]) -> Iterator[None]:
    """Catches a `BudgetError`, prints its message and the check's name, and adds both to `wrong`.

    The program continues with the next workload.
    """
    try:
        yield
    except BudgetError as error:
        wrong.append(f"{checked}: {error}")
        print(f"WRONG: {wrong[-1]}", flush=True)


def folder_of(record: str | bool) -> Path:
    """Returns the folder for the results of a run, created if needed."""
    folder = RESULTS / AVX2 if record == AVX2 else RESULTS if record else SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def recorded(name: str) -> dict[str, Any]:
    """Returns the document of a recorded run."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def publish(
    name: str,
    document: dict[str, Any],
    sections: Iterable[Section],
    record: str | bool,
    wrong: Sequence[str] = (),
    draw: Callable[[dict[str, Any], Path], list[Path]] = lambda document, folder: [],
) -> None:
    """Writes the raw rows, texts and plots of a run. Prints the texts and the paths.

    A run with wrong results is not recorded.

    Args:
        name: The name of the JSON file.
        document: The content of the JSON file.
        sections: The texts. If the run is recorded, each replaces its section of a page.
        record: Whether the run is recorded; `AVX2` to record only tables, and no plots, as those
            of AVX2.
        wrong: The workloads that were not timed because a check failed.
        draw: Draws the plots in a folder, and returns their files.

    Raises:
        SystemExit: Results were wrong; the message lists them.
    """
    if wrong:
        record = False
        document = document | {"wrong": wrong}
    folder = folder_of(record)
    raw = folder / f"{name}.json"
    raw.write_text(json.dumps(document) + "\n", encoding="utf-8")
    written = [raw]
    if record == AVX2:
        sections = sections_of_avx2(sections)
    for section in sections:
        text = section.report(document)
        print(text, end="\n\n")
        written.append(write_text(folder, section.name, text, record, section.page))
    announce(*written, *(draw(document, folder) if record != AVX2 else ()))
    if wrong:
        raise SystemExit("\n".join((FAILED, *wrong)))


def write_text(folder: Path, name: str, text: str, record: str | bool, page: Path) -> Path:
    """Writes a text to its section of `page` if `record`, else to a file in `folder`.

    Nothing is written for pages in `BUILT`, which show the recorded rows when the site is built.
    """
    if record:
        if page not in BUILT:
            write_section(page, name, text)
        return page
    path = folder / f"{name}.md"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def announce(*paths: Path) -> None:
    """Prints which files a run has written."""
    shown = (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in paths)
    print(f"Written: {', '.join(map(str, shown))}")


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces the text between a section's markers on a page."""
    page.write_text(with_section(page.read_text(encoding="utf-8"), page.name, name, text), "utf-8")


def with_section(source: str, page: str, name: str, text: str) -> str:
    """Returns the source of a page with a text between a section's markers."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = source.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{page} has no section between {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
