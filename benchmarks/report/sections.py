"""Rewrites the tables of the documents from the recorded results, without measuring.

Run `python -m benchmarks.report.sections` after a change in the layout of a table.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import __main__ as cases
from benchmarks.cpu import (
    applications,
    eight_bits,
    fading,
    first_call,
    layers,
    leaky,
    peers,
    precision,
    prepared,
    projections,
    roofline,
    sixteen_bits,
    steps,
    streams,
    threads,
    torch_operators,
    waiting,
    wide,
)
from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import PERFORMANCE, PERFORMANCE_TABLES, README, REAL_MODELS, RESULTS
from benchmarks.names import classifier_report, study, study_report
from benchmarks.report import speed


class Section(NamedTuple):
    """The text between two markers on a page."""

    page: Path
    name: str
    results: str
    """The name of the recorded file, without its extension."""
    report: Callable[[dict[str, Any]], str]

    def text(self) -> str:
        """Returns the section, generated from the recorded results."""
        return self.report(recorded(self.results))


def recorded(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


STUDIES = (
    applications,
    wide,
    layers,
    prepared,
    precision,
    sixteen_bits,
    eight_bits,
    projections,
    leaky,
    streams,
    steps,
    fading,
    torch_operators,
)
SECTIONS = (
    Section(README, "speed", "latest", speed.summary_and_plot),
    Section(PERFORMANCE, "classes", "latest", speed.classes),
    Section(PERFORMANCE_TABLES, "benchmark table", "latest", speed.table_and_plots),
    *(
        Section(PERFORMANCE_TABLES, name, name, peers.STUDY.report)
        for name in ("peers_2", "peers_1", "odd_2", "odd_1")
    ),
    *(
        Section(each.page, each.name, each.name, each.report)
        for each in (module.STUDY for module in STUDIES)
    ),
    *(
        Section(PERFORMANCE_TABLES, name, name, report)
        for name, report in (
            ("avx2", speed.section),
            ("first_call", first_call.report),
            ("waiting", waiting.report),
            ("roofline", roofline.report),
            ("threads", threads.report),
            ("classifier", classifier_report.report),
        )
    ),
    Section(REAL_MODELS, "cases", "cases", cases.STUDY.report),
    Section(PERFORMANCE, "models", "cases", cases.summary),
    Section(study.PAGE, "names", "names", study_report.report),
)


def main() -> None:
    for section in SECTIONS:
        write_section(section.page, section.name, section.text())
    study.write_card(recorded("names"))


if __name__ == "__main__":
    main()
