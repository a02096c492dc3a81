"""Rewrites the tables of the documents from the recorded results, without measuring.

Run `python -m benchmarks.report.sections` after a change in the layout of a table.
"""

from benchmarks.cases import __main__ as cases
from benchmarks.cpu import (
    applications,
    eight_bits,
    equations,
    grid,
    leaky,
    loops,
    peers,
    precision,
    prepared,
    roofline,
    sixteen_bits,
    soak,
    steps,
    streams,
)
from benchmarks.harness.pages import AVX2, recorded, with_section, write_section
from benchmarks.harness.paths import BUILT, RESULTS, sections_of_avx2
from benchmarks.names import classifier, study

STUDIES = (
    grid,
    applications,
    cases,
    prepared,
    precision,
    sixteen_bits,
    eight_bits,
    leaky,
    equations,
    streams,
    steps,
    loops,
)
OTHERS = roofline, soak, classifier, study
OF_ALL = (
    *(
        (each.name, section)
        for each in (module.STUDY for module in STUDIES)
        for section in each.sections
    ),
    *((name, section) for name, each in peers.STUDIES.items() for section in each.sections),
    *((module.SECTION.name, module.SECTION) for module in OTHERS),
)
"""The name of the recorded file, without its extension, and each section that shows it."""
SECTIONS = (
    *OF_ALL,
    *(
        (f"{AVX2}/{name}", section)
        for name, each in OF_ALL
        if (RESULTS / AVX2 / f"{name}.json").exists()
        for section in sections_of_avx2([each])
    ),
)


def built(page: str, source: str) -> str:
    """Returns the source of a page of the site; fills the sections of pages in `BUILT`."""
    for results, section in SECTIONS:
        if section.page in BUILT and section.page.stem == page:
            text = section.report(recorded(results))
            source = with_section(source, page, section.name, text)
    return source


def main() -> None:
    for results, section in SECTIONS:
        if section.page not in BUILT:
            write_section(section.page, section.name, section.report(recorded(results)))
    study.write_card(recorded("names"))


if __name__ == "__main__":
    main()
