"""Compares the bits of two builds: runs the digest program for each, at every instruction set."""

import json
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from tools.revisions.builds import Build, command, environment_of
from tools.revisions.cases import DTYPES

Digests = dict[str, dict[str, str]]
"""For each case and number of threads, a digest for each result."""


@dataclass(frozen=True)
class Level:
    """An instruction set: the name that ATEN_CPU_CAPABILITY has for it, and what then runs."""

    name: str
    kernels: tuple[str, str]
    """The kernels for float32 and bfloat16."""
    dtypes: tuple[str, ...] = DTYPES
    """The dtypes that have a kernel of their own at this level."""


LEVELS = (
    Level("default", ("baseline", "baseline")),
    Level("avx2", ("avx2", "avx2")),
    Level("avx512", ("avx512", "avx512")),
    Level("avx512_bf16", ("avx512", "avx512_bf16"), ("bfloat16",)),
    Level("amx", ("avx512", "amx"), ("bfloat16",)),
)


class MissingError(Exception):
    """The processor does not have an instruction set; the message says what ran instead."""


@dataclass
class Comparison:
    """What two revisions have in common and what not, by case."""

    cases: int = 0
    differing: dict[str, list[str]] = field(default_factory=dict)
    """For each case that differs between the revisions, the results that do."""
    unstable: dict[str, list[str]] = field(default_factory=dict)
    """For each case that differs between two runs of one revision, the results that do."""
    raised: dict[str, str] = field(default_factory=dict)
    """For each case that raises in both revisions, the exception: such a case compares nothing."""

    @property
    def failed(self) -> bool:
        """Whether anything is amiss. Nothing to compare is amiss, too."""
        return not self.cases or bool(self.differing or self.unstable or self.raised)


def differences(one: Digests, other: Digests) -> dict[str, list[str]]:
    """Returns, for each case in which two runs differ, the names of the results that differ."""
    found = {}
    for case in dict.fromkeys([*one, *other]):
        ours, theirs = one.get(case, {}), other.get(case, {})
        names = dict.fromkeys([*ours, *theirs])
        if wrong := [name for name in names if ours.get(name) != theirs.get(name)]:
            found[case] = wrong
    return found


def compare(base: Digests, new: Digests, again: Digests) -> Comparison:
    """Compares the digests of two revisions, and those of two runs of the newer one.

    Args:
        base: the digests of the older revision.
        new: the digests of the newer revision.
        again: the digests of a second run of the newer revision, perhaps of a part of the cases.
    """
    return Comparison(
        cases=len(new),
        differing=differences(base, new),
        unstable=differences({case: new[case] for case in again if case in new}, again),
        raised={
            case: results["raised"]
            for case, results in new.items()
            if "raised" in results and base.get(case) == results
        },
    )


def run(build: Build, level: Level, threads: tuple[int, ...] = (1, 2)) -> Digests:
    """Runs the digest program for a build in a fresh process.

    Args:
        build: the build to run.
        level: the instruction set to run with.
        threads: the numbers of threads to run with.

    Returns:
        The digests.

    Raises:
        MissingError: the processor does not have the instruction set.
        RuntimeError: the program failed.
    """
    arguments = ["--kernels", *level.kernels, "--dtypes", *level.dtypes]
    arguments += ["--threads", *map(str, threads)]
    # Threads that wait asleep change no result, and let others run on a busy machine.
    environment = environment_of(build, ATEN_CPU_CAPABILITY=level.name, OMP_WAIT_POLICY="passive")
    start = time.perf_counter()
    ran = subprocess.run(
        command(build, "digest", *arguments),
        cwd=build.library,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = ran.stdout.splitlines()
    if ran.returncode or not lines:
        raise RuntimeError(f"{build}, {level.name}: exit {ran.returncode}\n{ran.stderr[-3000:]}")
    if tuple(json.loads(lines[0])) != level.kernels:
        raise MissingError(" and ".join(json.loads(lines[0])))
    digests: Digests = json.loads(lines[1])
    seconds = time.perf_counter() - start
    print(f"  {build}: {len(digests)} digested in {seconds:.0f} s", flush=True)
    return digests


def report(comparison: Comparison) -> None:
    """Prints what a comparison found, every case by name."""
    for heading, found in (
        ("differs", comparison.differing),
        ("is not reproducible within one revision", comparison.unstable),
    ):
        for case, results in found.items():
            print(f"  {case}: {heading} in {', '.join(results)}")
    for case, error in comparison.raised.items():
        print(f"  {case}: raises in both revisions, {error}")
    print(
        f"  {comparison.cases} compared: {len(comparison.differing)} differ, "
        f"{len(comparison.unstable)} are not reproducible, {len(comparison.raised)} raise",
        flush=True,
    )


def compare_builds(base: Build, new: Build, levels: Collection[str]) -> bool:
    """Compares two builds at the instruction sets of these names that the processor has.

    Returns:
        Whether all bits are the same.
    """
    same, compared = True, []
    for level in LEVELS:
        if level.name not in levels:
            continue
        print(f"ATEN_CPU_CAPABILITY={level.name}:", flush=True)
        try:
            comparison = compare(run(base, level), run(new, level), run(new, level, (2,)))
        except MissingError as error:
            print(f"  not compared: this machine runs {error} instead")
            continue
        report(comparison)
        same = same and not comparison.failed
        compared.append(level.name)
    print(f"{'Same bits' if same else 'NOT the same bits'}: {base} and {new}")
    print(f"Instruction sets compared: {', '.join(compared) or 'none'}.")
    return same and bool(compared)
