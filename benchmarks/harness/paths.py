"""Paths of the results, the documents and the repository itself, defined only here."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
"""Recorded results, tracked by git."""
SCRATCH = ROOT / "build" / "bench"
"""Results of unrecorded runs, ignored by git."""
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PERFORMANCE = DOCS / "performance.md"
PERFORMANCE_TABLES = DOCS / "performance_tables.md"
"""The CPU tables that are not in `PERFORMANCE`."""
PERFORMANCE_AVX2 = DOCS / "performance_avx2.md"
"""Tables of runs with AVX2."""
BUILT = PERFORMANCE_TABLES, PERFORMANCE_AVX2
"""Pages whose sections are empty in the repository: `make docs` fills them from `RESULTS`."""
REAL_MODELS = DOCS / "real_models.md"
CAPABILITIES = DOCS / "capabilities.md"


class Section(NamedTuple):
    """A generated text between two markers on a page."""

    page: Path
    name: str
    report: Callable[[dict[str, Any]], str]
    """Returns the text, from the results of a run."""


def sections_of_avx2(sections: Iterable[Section]) -> list[Section]:
    """Returns the sections of `PERFORMANCE_AVX2`, from a program's sections: its tables."""
    pages = PERFORMANCE_TABLES, REAL_MODELS
    tables = (section for section in sections if section.page in pages)
    return [section._replace(page=PERFORMANCE_AVX2) for section in tables]
