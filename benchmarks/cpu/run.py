"""Runs the programs of `make bench`: `python -m benchmarks.cpu.run [--quick]`.

Results go to `build/bench/`, which git ignores. With `--record` they replace the recorded results,
their tables in `docs/` and the summary in the README. If a workload fails its check, it is not
timed, and the results of its program are not recorded. The run continues with the other workloads,
and ends with an error that names the failed workloads.
"""

import json
import subprocess
import sys

from benchmarks.harness import pages
from benchmarks.harness.paths import ROOT, SCRATCH

PROGRAMS = ("cpu.grid", "names.classifier")


def failures(name: str, *arguments: str) -> list[str]:
    """Runs a program from the root of the repository; returns the checks that failed."""
    results = SCRATCH / f"{name.split('.')[-1]}.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    status = subprocess.run(command, cwd=ROOT).returncode
    if status == 0:
        return []
    wrong = json.loads(results.read_text(encoding="utf-8")).get("wrong") if results.exists() else []
    return [f"benchmarks.{name}: {what}" for what in wrong or [f"exited with status {status}"]]


def main() -> None:
    options = pages.parse(pages.parser(__doc__, seconds=1.3))
    also = [f"--threads={options.threads}"]
    also += ["--quick"] * options.quick + [f"--record={options.record}"] * bool(options.record)
    if not options.record and not options.quick:
        print("Timing the layers, then the names classifier: about two minutes", flush=True)
    wrong = failures(PROGRAMS[0], f"--seconds={options.seconds}", *also)
    for name in PROGRAMS[1:]:
        wrong += failures(name, *also)
    # Times the grid again in another process, after other programs.
    if options.record and not wrong:
        wrong = failures(PROGRAMS[0], "--again", f"--seconds={options.seconds}", *also)
    if wrong:
        sys.exit("\n".join((pages.FAILED, *wrong)))


if __name__ == "__main__":
    main()
