"""Where results, documents and the repository itself lie: defined here and nowhere else."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
"""Recorded results, which git keeps."""
SCRATCH = ROOT / "build" / "bench"
"""Results of runs that are not recorded, which git ignores."""
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PERFORMANCE = DOCS / "performance.md"
PERFORMANCE_TABLES = DOCS / "performance_tables.md"
"""Every table of the CPU benchmarks that `PERFORMANCE` does not have."""
CAPABILITIES = DOCS / "capabilities.md"
GPU_REPORT = DOCS / "gpu_report.md"
