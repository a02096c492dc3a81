"""Are two revisions bit-identical? python -m tools.revisions.bits BASE [REVISION]"""

import json
import sys

from tools.revisions import builds
from tools.revisions.probes import DTYPES

Digests = dict[str, dict[str, str]]
"""The digests of each call's results, by name; or its exception, as `raised`."""

# Maps each value of ATEN_CPU_CAPABILITY to the kernels for float32 and for bfloat16.
LEVELS = {
    "default": ("baseline", "baseline"),
    "avx2": ("avx2", "avx2"),
    "avx512": ("avx512", "avx512"),
    "avx512_bf16": ("avx512", "avx512_bf16"),
    "amx": ("avx512", "amx"),
}


def digests_of(build: builds.Build, level: str) -> Digests:
    """Returns a build's digests; empty if the machine lacks the instruction set `level`."""
    kernels = LEVELS[level]
    # If the two kernels differ, another level already compares all dtypes except bfloat16.
    dtypes = DTYPES if kernels[0] == kernels[1] else ("bfloat16",)
    # Passive waiting changes no result, and leaves the processors to other programs.
    environment = {"ATEN_CPU_CAPABILITY": level, "OMP_WAIT_POLICY": "passive"}
    program = build.start("-m", "tools.revisions.digest", *kernels, *dtypes, **environment)
    printed, _ = program.communicate()
    if program.returncode:
        raise SystemExit(f"{build}, {level}: exit code {program.returncode}")
    return json.loads(printed)


def findings(base: Digests, new: Digests) -> list[str]:
    """Returns a line for each call that has different results, or that raises an exception.

    Excludes calls that raise only in the older revision, such as calls of a new cell.
    """
    found = []
    for call in dict.fromkeys([*base, *new]):
        old, newer = base.get(call, {}), new.get(call, {})
        if "raised" in old and newer and "raised" not in newer:
            continue
        names = dict.fromkeys([*old, *newer])
        if wrong := [name for name in names if old.get(name) != newer.get(name)]:
            found.append(f"{call}: differs in {', '.join(wrong)}")
        elif "raised" in old:
            found.append(f"{call}: raises in both revisions, {old['raised']}")
    return found


def main() -> bool:
    """Prints all findings; returns True if calls were compared and there are no findings."""
    parser = builds.parser(__doc__)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=[*LEVELS])
    options = parser.parse_args()
    base, new = builds.build(options.base), builds.build(options.revision)
    wrong, compared = 0, []
    for level in options.levels:
        print(f"ATEN_CPU_CAPABILITY={level}:", flush=True)
        old, newer = digests_of(base, level), digests_of(new, level)
        if not old and not newer:
            print("  not compared: this machine does not support it")
            continue
        found = findings(old, newer)
        for finding in found:
            print(f"  {finding}")
        print(f"  {len(newer)} compared: {len(found)} differ or raise", flush=True)
        wrong += len(found)
        compared.append(level)
    print(f"{'NOT the same bits' if wrong else 'Same bits'}: {base} and {new}")
    print(f"Instruction sets compared: {', '.join(compared) or 'none'}.")
    return bool(compared) and not wrong


if __name__ == "__main__":
    sys.exit(not main())
