"""Runs the benchmarks of `make bench` and reports them: `python -m benchmarks.cpu.run [--quick]`.

Results go to `build/bench/`, which git ignores. With `--record` a full run without an error
replaces the recorded results, the tables in `docs/performance.md` and the summary in the README.
"""

import subprocess
import sys

from benchmarks.harness import pages
from benchmarks.harness.paths import ROOT, SCRATCH


def python(module: str, *arguments: str) -> int:
    """Runs a module from the root of the repository; returns its exit status."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode


def main() -> int:
    parser = pages.parser(__doc__, seconds=2.0)
    options = pages.parse(parser)
    threads, quick = f"--threads={options.threads}", ["--quick"] if options.quick else []

    SCRATCH.mkdir(parents=True, exist_ok=True)
    raw = SCRATCH / "latest.json"
    raw.unlink(missing_ok=True)
    status = python(
        "pytest",
        "benchmarks/cpu",
        "--override-ini=python_files=bench_*.py",
        "--override-ini=addopts=",
        threads,
        f"--seconds={options.seconds}",
        f"--benchmark-json={raw}",
        "--benchmark-quiet",
        "--tb=short",
        "-v",
        *quick,
    )
    if not raw.exists():
        return status or 1
    # A run with an error is reported, but not recorded.
    record = ["--record"] if options.record and status == 0 else []
    others = ("cpu.fading", "cpu.torch_operators", "classifier.run")
    for module in (f"benchmarks.{name}" for name in others):
        status = python(module, threads, *quick, *record) or status
    return python("benchmarks.report.speed", str(raw), *record) or status


if __name__ == "__main__":
    sys.exit(main())
