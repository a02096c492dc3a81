"""Paths of the results, the documents and the repository itself, defined only here."""

from pathlib import Path

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
REAL_MODELS = DOCS / "real_models.md"
CAPABILITIES = DOCS / "capabilities.md"
GPU_REPORT = DOCS / "gpu_report.md"
