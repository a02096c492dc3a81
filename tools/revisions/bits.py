"""Do two revisions compute the same bits? python -m tools.revisions.bits BASE [REVISION]"""

import json
import sys

from tools.revisions import builds
from tools.revisions.cases import DTYPES

Digests = dict[str, dict[str, str]]
"""For each call, a digest of each of its results, or its exception as `raised`."""

# For each instruction set, by its name in ATEN_CPU_CAPABILITY, the kernels of float32 and bfloat16.
LEVELS = {
    "default": ("baseline", "baseline"),
    "avx2": ("avx2", "avx2"),
    "avx512": ("avx512", "avx512"),
    "avx512_bf16": ("avx512", "avx512_bf16"),
    "amx": ("avx512", "amx"),
}


def digests_of(build: builds.Build, level: str) -> Digests:
    """Returns the digests of a build at an instruction set, or none if the machine lacks that."""
    kernels = LEVELS[level]
    dtypes = DTYPES if kernels[0] == kernels[1] else ("bfloat16",)  # those not compared before
    # Threads that wait asleep change no result, and let others run on a busy machine.
    environment = {"ATEN_CPU_CAPABILITY": level, "OMP_WAIT_POLICY": "passive"}
    program = build.start("-m", "tools.revisions.digest", *kernels, *dtypes, **environment)
    printed, _ = program.communicate()
    if program.returncode:
        raise SystemExit(f"{build}, {level}: exit {program.returncode}")
    return json.loads(printed)


def findings(base: Digests, new: Digests) -> list[str]:
    """Returns what is wrong with each call that differs, or that raises and so compares nothing."""
    found = []
    for call in dict.fromkeys([*base, *new]):
        old, newer = base.get(call, {}), new.get(call, {})
        names = dict.fromkeys([*old, *newer])
        if wrong := [name for name in names if old.get(name) != newer.get(name)]:
            found.append(f"{call}: differs in {', '.join(wrong)}")
        elif "raised" in old:
            found.append(f"{call}: raises in both revisions, {old['raised']}")
    return found


def main() -> bool:
    """Prints every finding, and returns whether there is none."""
    parser = builds.parser(__doc__)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=[*LEVELS])
    options = parser.parse_args()
    base, new = builds.build(options.base), builds.build(options.revision)
    wrong, compared = 0, []
    for level in options.levels:
        print(f"ATEN_CPU_CAPABILITY={level}:", flush=True)
        old, newer = digests_of(base, level), digests_of(new, level)
        if not old and not newer:
            print("  not compared: this machine does not have it")
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
