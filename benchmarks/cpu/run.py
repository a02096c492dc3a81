"""Runs the benchmarks of `make bench` and reports them: `python -m benchmarks.cpu.run [--quick]`.

Results go to `build/bench/`, which git ignores. With `--record` a full run replaces the recorded
results, their tables in `docs/` and the summary in the README, and times all workloads instead of a
third. A workload with a failed check is not timed; the others are, and the run ends with an error
that names it. If a check fails in the grid, nothing is recorded; if it fails in one of the programs
that run afterwards, only that program's results are not recorded.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import pages
from benchmarks.harness.paths import ROOT, SCRATCH

OTHERS = ("cpu.steps", "cpu.torch_operators", "names.classifier")
"""Programs that run after the grid."""
OTHERS_OF_RECORDS = ("cpu.fading",)
"""Programs that run only with `--record`."""


def python(module: str, *arguments: str) -> int:
    """Runs a module from the root of the repository; returns its exit status."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode


def failures(raw: Path, module: str, status: int) -> list[str]:
    """Returns the failed checks of a module that has ended, from the results it wrote."""
    if status == 0:
        return []
    wrong = json.loads(raw.read_text(encoding="utf-8")).get("wrong") if raw.exists() else None
    return [f"{module}: {what}" for what in wrong or [f"exited with status {status}"]]


def main() -> int:
    options = pages.parse(pages.parser(__doc__, seconds=1.3))
    threads, quick = f"--threads={options.threads}", ["--quick"] if options.quick else []
    whole = ["--whole-grid"] if options.record else []

    SCRATCH.mkdir(parents=True, exist_ok=True)
    raw = SCRATCH / "latest.json"
    raw.unlink(missing_ok=True)
    status = python(
        "pytest",
        "benchmarks/cpu",
        "benchmarks/names",
        "--override-ini=python_files=bench_*.py",
        "--override-ini=addopts=",
        threads,
        f"--seconds={options.seconds}",
        f"--benchmark-json={raw}",
        "--benchmark-quiet",
        "--tb=short",
        "-v",
        *quick,
        *whole,
    )
    if not raw.exists():
        return status or 1
    # A run with an error is reported, but not recorded.
    record = ["--record"] if options.record and status == 0 else []
    wrong = failures(raw, "benchmarks.cpu", status)
    for name in OTHERS + OTHERS_OF_RECORDS * options.record:
        written = SCRATCH / f"{name.split('.')[-1]}.json"
        written.unlink(missing_ok=True)
        module = f"benchmarks.{name}"
        wrong += failures(written, module, python(module, threads, *quick, *record))
    if reported := python("benchmarks.report.speed", str(raw), *record):
        wrong.append(f"benchmarks.report.speed: exited with status {reported}")
    if wrong:
        print(pages.failures(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
