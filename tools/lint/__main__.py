"""Lints the machine code of the GPU kernels, without a GPU: `make gpu-lint`.

Compiles the kernels for the cases of `cases.py`, checks the rules of `rules.py`, and compares what
a step takes with the record. `--record` replaces the record and the table in `docs/gpu_lint.md`.
"""

import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import triton

from benchmarks.harness import pages
from benchmarks.harness.paths import GPU_LINT
from namernn_fast.bench.tables import markdown
from tools.lint import budgets, known, rules
from tools.lint.building import build
from tools.lint.cases import DENSE, Case, cases
from tools.lint.counts import Counts, count
from tools.lint.events import Finding, Kernel
from tools.lint.machine import UnknownValueError

_SHOWN = 3  # findings of one rule in one case


class Result(NamedTuple):
    """What the lint found in a case."""

    case: Case
    findings: list[Finding]
    counts: Counts | None
    """What a step takes, or None where the code does not tell."""


def lint(case: Case) -> Result:
    """Compiles a case, and checks it."""
    kernel = Kernel(case, build(case))
    findings = list(rules.check(kernel))
    try:
        return Result(case, findings, count(kernel))
    except UnknownValueError as what:
        lost = Finding("loop", f"cannot tell how often: {what}")
        return Result(case, [*findings, lost], None)


def compare(results: list[Result]) -> tuple[list[Result], list[str]]:
    """Returns the results with what exceeds its budget among the findings, and remarks."""
    version, recorded = budgets.load()
    found, remarks = [], []
    if version != triton.__version__:
        remarks.append(
            f"The record is of Triton {version or 'nothing'}, not {triton.__version__}: budgets "
            "are not compared."
        )
        return results, remarks
    for case, findings, counts in results:
        budget = recorded.get(case.name)
        if budget is None:
            more = [Finding("budget", "is not recorded: run make gpu-lint RECORD=1")]
        else:
            more = list(budgets.exceeded(counts, budget)) if counts else []
        found.append(Result(case, findings + more, counts))
    improved = [
        case.name
        for case, _, counts in results
        if counts and case.name in recorded and budgets.has_improved(counts, recorded[case.name])
    ]
    if improved:
        remarks.append(f"{len(improved)} cases take less than recorded, as {improved[0]}.")
        remarks.append("Run make gpu-lint RECORD=1 to hold them to it.")
    return found, remarks


def set_known_apart(results: list[Result], whole: bool) -> tuple[list[Result], list[str]]:
    """Returns the results without what is known, and remarks about that.

    Args:
        results: Of the cases.
        whole: Whether these are all cases: what is known must be among them then.
    """
    seen: dict[known.Known, set[str]] = {one: set() for one in known.KNOWN}
    left = []
    for case, findings, counts in results:
        new = []
        for finding in findings:
            if one := known.find(case.name, finding):
                seen[one].add(case.name)
            else:
                new.append(finding)
        left.append(Result(case, new, counts))
    if whole:
        gone = [one for one, names in seen.items() if not names]
        left[0].findings.extend(Finding("known", f"is mended: {one.why}") for one in gone)
    return left, [
        f"Known of {len(names)} kernels: {one.why}." for one, names in seen.items() if names
    ]


def report(results: list[Result], remarks: list[str]) -> str:
    """Returns all findings, and how many cases break each rule."""
    lines = []
    broken: Counter[str] = Counter()
    for case, findings, *_ in results:
        by_rule: dict[str, list[str]] = {}
        for finding in findings:
            by_rule.setdefault(finding.rule, []).append(finding.message)
        for rule, messages in by_rule.items():
            broken[rule] += 1
            lines += [f"{case.name}: {rule}: {message}" for message in messages[:_SHOWN]]
            if len(messages) > _SHOWN:
                lines.append(f"{case.name}: {rule}: and {len(messages) - _SHOWN} more")
    lines.append("")
    clean = sum(not findings for _, findings, *_ in results)
    lines.append(f"{len(results)} kernels, of which {clean} break no rule.")
    lines += [f"- {rule}: {count} kernels" for rule, count in broken.most_common()]
    return "\n".join([*lines, *remarks])


def table(results: list[Result]) -> str:
    """Returns what a step takes, for the plans with dense rows."""
    heads = ["", "dtype", "H", "plan", "members x tiles", "B x N x K", "warps", "kernel"]
    heads += [name.replace("_", " ") for name in Counts._fields]
    lines = [heads]
    for case, _, counts in results:
        if case.rows != DENSE or case.directions != 1 or counts is None:
            continue
        made, plan = case.build, case.build.plan
        lines.append(
            [
                *(made.device.arch, made.precision, str(made.hidden_size), plan.kind),
                f"{plan.members} x {plan.tiles}",
                f"{plan.block_b} x {plan.block_n} x {plan.block_k}",
                *(str(plan.warps), case.kernel, *map(str, counts)),
            ]
        )
    return markdown(lines)


def text(results: list[Result]) -> str:
    """Returns the section of the page: the rules that are broken, and what a step takes."""
    introduction = (
        f"Compiled by Triton {triton.__version__}. A step of one program, with dense rows and one "
        "direction: instructions as one warp issues them, bytes of all warps of the program."
    )
    return f"{introduction}\n\n{table(results)}"


def main() -> int:
    parser = pages.parser(__doc__)
    parser.add_argument("--only", default="", help="the cases whose names hold this text")
    parser.add_argument("--quick", action="store_true", help="few cases: a trial run")
    options = pages.parse(parser)
    chosen = [case for case in cases() if options.only in case.name]
    if options.quick:
        chosen = chosen[:: max(1, len(chosen) // 12)]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(lint, chosen))
    if options.record:
        if options.only:
            parser.error("a part of the cases is no record")
        counts = {case.name: counts for case, _, counts in results if counts}
        recorded = budgets.document(triton.__version__, counts)
        pages.publish("gpu_lint", recorded, text(results), record=True, page=GPU_LINT)
        remarks = []
    else:
        results, remarks = compare(results)
    results, more = set_known_apart(results, not (options.only or options.quick))
    print(report(results, remarks + more))
    return int(any(findings for _, findings, *_ in results))


if __name__ == "__main__":
    sys.exit(main())
