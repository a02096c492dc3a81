"""Run the benchmarks and report them: `python benchmarks/run.py [--quick] [--threads N]`.

A full green run replaces `results/latest.json` and the plots beside it. A quick run, or one with a
cell in the red, leaves its files in `results/scratch/`, which git ignores.
"""

import argparse
import os
import subprocess
import sys

from benchmarks.harness.paths import RESULTS, ROOT, SCRATCH


def python(module: str, *arguments: str) -> int:
    """Run a module from the root of the repository; its exit status."""
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cells, few rounds, no record")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--write-readme", action="store_true", help="rewrite the README's section")
    options = parser.parse_args()
    if options.quick and options.write_readme:
        parser.error("a quick run is no measurement: it does not go into the README")

    SCRATCH.mkdir(parents=True, exist_ok=True)
    raw = SCRATCH / "run.json"
    raw.unlink(missing_ok=True)
    status = python(
        "pytest",
        "benchmarks/cpu",
        "--override-ini=python_files=bench_*.py",
        "--override-ini=addopts=",
        f"--threads={options.threads}",
        f"--benchmark-json={raw}",
        "--benchmark-quiet",
        "--tb=short",
        "-v",
        *(["--quick"] if options.quick else []),
    )
    if not raw.exists():
        return status or 1
    if status == 0 and not options.quick:
        raw = raw.replace(RESULTS / "latest.json")
    report = ["benchmarks.report.speed", str(raw)]
    if options.write_readme and status == 0:
        report.append("--write-readme")
    return python(*report) or status


if __name__ == "__main__":
    sys.exit(main())
