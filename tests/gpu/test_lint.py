"""The lint of the GPU kernels' machine code: it passes the kernels, and catches planted faults."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from namernn_fast.gpu import kernels  # noqa: E402
from tools.lint import budgets, rules  # noqa: E402
from tools.lint.__main__ import Result, compare, lint, set_known_apart  # noqa: E402
from tools.lint.building import Built, build  # noqa: E402
from tools.lint.cases import CALLS, DENSE, DEVICES, Case, cases  # noqa: E402
from tools.lint.counts import Counts, count  # noqa: E402
from tools.lint.events import Event, Finding, Kernel  # noqa: E402
from tools.lint.flow import Flow  # noqa: E402
from tools.lint.sass import parse  # noqa: E402

ALL = list(cases())


def case(arch, precision, kind, kernel="forward", rows=DENSE, directions=1) -> Case:
    """Returns the first case of this description whose plan has several members, if any has."""
    found = [
        case
        for case in ALL
        if (case.build.device.arch, case.build.precision) == (arch, precision)
        and (case.build.plan.kind, case.kernel, case.rows, case.directions)
        == (kind, kernel, rows, directions)
    ]
    return max(found, key=lambda case: (case.build.plan.members > 1, -case.build.hidden_size))


def broken(case: Case, built: Built) -> set[str]:
    """Returns the names of the rules that a kernel breaks."""
    return {finding.rule for finding in rules.check(Kernel(case, built))}


# ---- The kernels as they are ----

# Each architecture once, each kernel, kind of plan and precision.
SAMPLE = [
    case("sm_80", "float32", "streamed"),
    case("sm_86", "bfloat16", "cooperative", "backward"),
    case("sm_89", "TF32", "cooperative"),
    case("sm_90", "float32", "cooperative", "backward"),
    case("sm_100", "TF32", "streamed"),
    case("sm_120", "bfloat16", "resident"),
]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_the_kernels_break_no_rule(case):
    (result,), _ = compare([lint(case)])
    assert result.findings == []
    version, recorded = budgets.load()
    if version == triton.__version__:
        assert result.counts == recorded[case.name]


def test_the_cases_cover_every_kind_of_rows_with_every_kind_of_plan():
    met = {(case.build.device.arch, case.build.plan.kind, case.kernel, case.rows) for case in ALL}
    for arch in (device.arch for device in DEVICES):
        for kind in ("resident", "cooperative", "streamed"):
            for rows in CALLS:
                assert (arch, kind, "forward", rows) in met
                assert (arch, kind, "backward", rows) in met or rows == "ids"
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)


# ---- Faults planted in the source ----

# The case, what replaces what in the kernels' source, and the rules that are broken.
COOPERATIVE = case("sm_90", "float32", "cooperative")
STREAMED = case("sm_80", "float32", "streamed")
ACQUIRE, RELAXED = 'arrivals, 0, sem="acquire"', 'arrivals, 0, sem="relaxed"'
OF_DIRECTION = "of_direction(weight_hh, weight_hh_reverse, program, FORM)"
MUTANTS = {
    "no release": (COOPERATIVE, 'sem="release"', 'sem="relaxed"', {"release"}),
    "no acquire": (COOPERATIVE, ACQUIRE, RELAXED, {"acquire"}),
    "no acquire, loads through L1": (STREAMED, ACQUIRE, RELAXED, {"acquire", "stale"}),
    "seen by one processor alone": (
        *(COOPERATIVE, 'sem="release", scope="gpu"', 'sem="release", scope="cta"'),
        {"arrival", "release"},
    ),
    "awaits the step before": (
        COOPERATIVE,
        "MEMBERS * (s + 1)",
        "MEMBERS * s",
        {"wait", "acquire"},
    ),
    "awaits one member less": (
        *(COOPERATIVE, "MEMBERS * (s + 1)", "MEMBERS * (s + 1) - 1"),
        {"wait"},
    ),
    "arrives twice": (COOPERATIVE, "(arrivals, 1,", "(arrivals, 2,", {"arrival"}),
    "reads weights in every step": (
        *(COOPERATIVE, "hx, step, right, n, program, FORM)\n            h ="),
        f"hx, step, kept_tile({OF_DIRECTION}, n, True, FORM), n, program, FORM)\n            h =",
        {"weights"},
    ),
    "numbers of sequences in 32 bits": (
        *(COOPERATIVE, "tl.arange(0, FORM.BLOCK_B)).to(tl.int64)", "tl.arange(0, FORM.BLOCK_B))"),
        {"index"},
    ),
}


def mutant(folder: Path, name: str, old: str, new: str):
    """Returns a copy of the kernels, imported, in which `new` is in the place of `old`."""
    name = "mutant_" + re.sub(r"\W", "_", name)
    shutil.copytree(Path(kernels.__file__).parent, folder / name)
    planted = 0
    for path in (folder / name).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        planted += text.count(old)
        path.write_text(text.replace(old, new), encoding="utf-8")
    assert planted == 1, f"{old!r} is in the kernels {planted} times"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_breaks_a_rule(name, tmp_path):
    case, old, new, expected = MUTANTS[name]
    planted = mutant(tmp_path, name, old, new)
    built = build(case, getattr(planted, f"{case.kernel}_kernel"), keep=False)
    assert broken(case, built) == expected


def test_a_spilled_loop_breaks_a_rule():
    built = build(COOPERATIVE, keep=False, maxnreg=64)
    assert broken(COOPERATIVE, built) == {"local"}


def test_a_loop_that_became_worse_exceeds_its_budget(tmp_path):
    (result,), _ = compare([lint(COOPERATIVE)])
    assert result.findings == []
    text = "z = load_rows(projected, source, n, there, FORM.WIDTH, FORM.LIMIT)"
    planted = mutant(tmp_path, "barrier", text, f"{text}\n            tl.debug_barrier()")
    kernel = Kernel(COOPERATIVE, build(COOPERATIVE, planted.forward_kernel, keep=False))
    (worse,), _ = compare([Result(COOPERATIVE, [], count(kernel))])
    assert {finding.rule for finding in worse.findings} == {"budget"}
    assert all("in a step, recorded were" in finding.message for finding in worse.findings)


# ---- Faults planted in the machine code: Triton has barriers of its own around an atomic ----


def without(built: Built, *patterns: str, between: tuple[str, str] = ("", "")) -> Built:
    """Returns a kernel without the instructions of these patterns, between two others if given."""
    kept, inside, left_out = [], not between[0], 0
    for line in built.sass.splitlines():
        if between[0] and re.search(between[0], line):
            inside = True
        elif between[1] and re.search(between[1], line):
            inside = False
        if inside and any(re.search(pattern, line) for pattern in patterns):
            left_out += 1
        else:
            kept.append(line)
    assert left_out
    return built._replace(sass="\n".join(kept))


BAR, FENCE, INVALIDATION = r"BAR\.SYNC", r"MEMBAR\.\w+\.GPU", r"CCTL\.IVALL"
ARRIVAL, STORE = r"\bREDG?\.E\.ADD", r"\bSTG\.E"
REMOVED = {
    "fence": ((FENCE,), {}, {"release"}),
    "invalidation": ((INVALIDATION,), {}, {"acquire"}),
    "first barrier": ((BAR,), {"between": (STORE, FENCE)}, {"release"}),
    "last barrier": ((BAR,), {"between": (INVALIDATION, r"\bEXIT")}, {"acquire"}),
    "arrival": ((ARRIVAL,), {}, {"arrival"}),
}


@pytest.mark.parametrize("case", [COOPERATIVE, STREAMED], ids=lambda case: case.name)
@pytest.mark.parametrize("name", REMOVED)
def test_an_instruction_that_is_missing_breaks_a_rule(case, name):
    patterns, where, expected = REMOVED[name]
    found = broken(case, without(build(case), *patterns, **where))
    assert expected <= found <= expected | {"stale"}


def test_a_program_without_others_needs_a_barrier():
    alone = next(
        case for case in ALL if case.build.plan.kind == "streamed" and case.build.plan.members == 1
    )
    built = build(alone)
    assert broken(alone, built) == set()
    assert broken(alone, without(built, BAR)) == {"order"}


# ---- The parts ----

TEXT = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R2, RZ ;
.L_x_0:
        /*0020*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.64.STRONG.GPU R4, desc[UR8][R6.64+0x10] ;
.L_x_1:
        /*0050*/                   IADD3 R2, P1, R2, 0x1, RZ ;
        /*0060*/                   ISETP.LT.AND P0, PT, R2, 0x5, PT ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
"""


def test_instructions():
    code = parse(TEXT)
    load = code.instructions[4]
    assert (load.opcode, load.results, load.address) == ("LDG", ["R4", "R5"], ["R6"])
    assert code.instructions[3].guard == "P0"
    assert code.instructions[5].results == ["R2", "P1"]
    assert code.labels[".L_x_1"] == 5
    with pytest.raises(ValueError, match="no instruction"):
        parse("nothing")


def test_loops():
    flow = Flow(parse(TEXT))
    (loop,) = flow.loops  # that behind EXIT cannot be reached
    assert list(flow.places(loop.blocks)) == [2, 3, 4, 5, 6, 7]


def test_events_of_the_exchange():
    kernel = Kernel(COOPERATIVE, build(COOPERATIVE))
    found = set(kernel.events.values())
    assert found == set(Event) - {Event.NEXT_STEP}


def test_budgets():
    before = Counts(*range(10, 10 + len(Counts._fields)))
    assert list(budgets.exceeded(before, before)) == []
    worse = before._replace(shuffles=99)
    message = f"99 shuffles in a step, recorded were {before.shuffles}"
    assert list(budgets.exceeded(worse, before)) == [Finding("budget", message)]
    assert budgets.has_improved(before, worse)
    assert not budgets.has_improved(worse, before)


def test_what_is_known_is_no_error():
    spills, *_ = [
        case for case in ALL if "sm_90 float32 H512" in case.name and "w16 forward" in case.name
    ]
    local, other = Finding("local", "something is spilled"), Finding("wait", "no wait")
    (result,), remarks = set_known_apart([Result(spills, [local, other], None)], whole=False)
    assert result.findings == [other]
    assert len(remarks) == 1
    (result,), remarks = set_known_apart([Result(COOPERATIVE, [local], None)], whole=False)
    assert result.findings == [local]
    assert remarks == []


def test_what_is_known_and_mended_is_an_error():
    (result,), _ = set_known_apart([Result(COOPERATIVE, [], None)], whole=True)
    assert {finding.rule for finding in result.findings} == {"known"}
