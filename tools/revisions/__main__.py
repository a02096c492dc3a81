"""Compares two revisions of the library that are built on this machine.

    python -m tools.revisions bits BASE [REVISION] [options]
    python -m tools.revisions speed BASE [REVISION] [options]
    python -m tools.revisions build BASE [REVISION] [options]

REVISION is the working tree as it stands, if it is not given. `bits` compares the bits of results
and gradients; `speed` times both revisions in turns; `build` builds them and does no more. A
revision that was built before is found in the cache. The exit code is 1 if the revisions differ, or
if the newer one is slower, and 2 if something could not be built or run.
"""

import argparse
import os
import sys
from pathlib import Path

from tools.revisions import bits, builds, planting, speed


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("base", metavar="BASE", help="the older revision")
    common.add_argument("revision", metavar="REVISION", nargs="?", default=builds.WORKING_TREE)
    common.add_argument("--cache", type=Path, default=builds.CACHE, help="folder of the builds")
    common.add_argument(
        "--plant",
        action="store_true",
        help="change a coefficient of tanh in REVISION by one last place, which must be noticed",
    )
    top = argparse.ArgumentParser(
        prog="python -m tools.revisions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)
    exact = commands.add_parser("bits", parents=[common], help="compare results bit for bit")
    names = [level.name for level in bits.LEVELS]
    exact.add_argument(
        "--levels", nargs="+", choices=names, default=names, help="values of ATEN_CPU_CAPABILITY"
    )
    commands.add_parser("build", parents=[common], help="build both revisions")
    timed = commands.add_parser("speed", parents=[common], help="time both revisions in turns")
    timed.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    timed.add_argument("--rounds", type=int, default=12, help="rounds over the whole grid, at most")
    timed.add_argument("--minutes", type=float, default=12, help="time for all rounds")
    timed.add_argument("--cells", default="", help="a regular expression that selects cells")
    timed.add_argument("--imports", type=int, default=10, help="fresh processes for import times")
    return top


def main() -> int:
    options = parser().parse_args()
    try:
        base = builds.build(options.base, options.cache)
        new = builds.build(options.revision, options.cache, options.plant)
        if options.command == "bits":
            return 0 if bits.compare_builds(base, new, options.levels) else 1
        if options.command == "speed":
            return 0 if speed.compare_builds(base, new, options) else 1
        for build in (base, new):
            print(f"{build}: {build.library}")
        return 0
    except (builds.BuildError, planting.PlantError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
