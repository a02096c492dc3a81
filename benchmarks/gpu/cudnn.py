"""Times the layer against cuDNN on a GPU: `make bench-gpu`, or `python -m benchmarks.gpu.cudnn`.

The benchmark needs a GPU, torch, Triton and NumPy. It needs no network and no build of the package,
and skips the plots if matplotlib is missing. `--dry-run` runs the same code on the CPU, with
kernels in Triton's interpreter and tiny workloads. A dry run shows that everything works, but
measures nothing.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
import triton

from benchmarks.gpu.dry_run import Interpreted, restart_interpreted
from benchmarks.gpu.race import DRY, EAGER, FAILED, GPU, RED, Row, run
from benchmarks.gpu.report import describe, publish
from benchmarks.harness import pages


def check_gpu() -> None:
    """Exits if there is no GPU, or if kernels would run in Triton's interpreter."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; --dry-run needs none")
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set: nothing would be measured")


def exit_status(rows: list[Row]) -> int:
    """Returns 1 if a call failed or the fused layer's results were wrong.

    A graph that cannot be captured does not count as a failure, and neither does a wrong rival.
    """
    bad = [r for r in rows if r["status"] == RED or (r["status"], r["launch"]) == (FAILED, EAGER)]
    return 1 if bad else 0


def main() -> int:
    begun = time.monotonic()
    parser = pages.parser(__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny workloads under the interpreter"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="start no workload after this many minutes"
    )
    parser.add_argument("--output", type=Path, help="the folder for table, JSON and plots")
    options = pages.parse(parser)
    if options.dry_run and options.record:
        parser.error("a dry run is not a measurement and cannot be recorded")
    if not options.dry_run:
        check_gpu()
    elif not triton.knobs.runtime.interpret:
        restart_interpreted()
    platform = dataclasses.replace(DRY, path=Interpreted().path) if options.dry_run else GPU

    rows: list[Row] = []
    document = {"machine": describe(platform), "measurement": platform is GPU, "rows": rows}
    try:
        rows.extend(run(platform, begun + 60 * options.minutes))
    finally:  # keeps the measured rows even if the run fails
        publish(document, options.output or pages.folder_of(options.record))
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
