"""Lints the machine code of the GPU kernels, without a GPU: `make gpu ONLY=lint`.

Compiles the variants of the kernels in `variants.py` and checks the rules in `rules.py`. For the
kernels of `make gpu ONLY=report`, compares instruction counts with the record.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import triton

from tools.gpu import resources
from tools.gpu.machine_code import Counts
from tools.lint.rules import SPILLING, Finding, build, check, known_spill
from tools.lint.variants import REPORTED, USUAL, Variant, variants


class Result(NamedTuple):
    """The lint's findings in one variant."""

    variant: Variant
    findings: list[Finding]
    counts: Counts | None
    """The instruction counts of a step, or None if there is no loop over time."""
    spill: str = ""
    """Why the kernel spills, if that is known."""


def lint(variant: Variant) -> Result:
    """Compiles and checks a variant."""
    built = build(variant)
    counts = built.code.count() if built.code.loops else None
    return Result(variant, list(check(built)), counts, known_spill(built))


def differences(result: Result, document: dict[str, Any]) -> Iterator[Finding]:
    """Yields every count of a variant that differs from the record of `make gpu ONLY=report`.

    Smaller counts must be recorded too, so that a later change cannot lose the gain unnoticed.
    """
    variant, counts = result.variant, result.counts
    if variant.rows != USUAL or variant.build.device not in REPORTED or counts is None:
        return
    plan = variant.build.plan._asdict()
    key = (variant.build.device.arch, variant.build.precision, variant.build.hidden_size, plan)
    for row in document["rows"]:
        if key == (row["arch"], row["dtype"], row["hidden_size"], row["plan"]):
            for name, now in counts._asdict().items():
                before = row[variant.kernel][name]
                if now != before:
                    what = name.replace("_", " ")
                    yield Finding("budget", f"{now} {what} in a step, but {before} recorded")
            return
    yield Finding("budget", "is not recorded: run make gpu ONLY=report RECORD=1")


def report(results: list[Result]) -> str:
    """Returns all findings, and the number of variants that break each rule."""
    lines = []
    broken: Counter[str] = Counter()
    for result in results:
        broken.update({finding.rule for finding in result.findings})
        lines += [f"{result.variant.name}: {rule}: {message}" for rule, message in result.findings]
    clean = sum(not result.findings for result in results)
    lines.append(f"{len(results)} kernels, {clean} without a finding.")
    lines += [f"- {rule}: {count} kernels" for rule, count in broken.most_common()]
    spills = Counter(result.spill for result in results if result.spill)
    lines += [f"Known to spill: {count}, because {why}." for why, count in spills.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="run only variants with this text in their names"
    )
    options = parser.parse_args()
    chosen = [variant for variant in variants() if options.only in variant.name]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(lint, chosen))
    document = json.loads(resources.RAW.read_text(encoding="utf-8"))
    if document["triton"] == triton.__version__:
        results = [
            result._replace(findings=[*result.findings, *differences(result, document)])
            for result in results
        ]
    else:
        print(f"The record was made with Triton {document['triton']}: budgets are not compared.")
    print(report(results))
    mended = set(SPILLING.values()) - {result.spill for result in results}
    for why in () if options.only else mended:
        print(f"No kernel spills any more because {why}: remove that from SPILLING.")
    return int((mended and not options.only) or any(result.findings for result in results))


if __name__ == "__main__":
    sys.exit(main())
