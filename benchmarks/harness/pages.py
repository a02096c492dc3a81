"""What the programs behind docs/performance.md share: options, a settled process, publishing."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.grid import MODES
from benchmarks.harness.paths import PERFORMANCE, RESULTS
from benchmarks.harness.race import keep_freed_memory

Rows = list[dict[str, Any]]


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """Options of a program that times cells, for so many seconds each by default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=seconds, help="for each cell")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    return parser


def settle(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()


def by_mode(introduction: str, rows: Rows, table: Callable[[Rows, str], str]) -> str:
    """The introduction, and under it a table of the rows for each mode."""
    parts = [introduction]
    for mode in MODES:
        parts += [f"**{mode}**", table(rows, mode)]
    return "\n\n".join(parts)


def publish(name: str, document: dict[str, Any], text: str, write: bool) -> None:
    """Raw rows to their file, the text to the terminal and, if wanted, to its place on the page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
    print(text)
    if write:
        write_section(PERFORMANCE, name, text)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between a section's markers on a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{page.name} has no section between {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
