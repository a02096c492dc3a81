"""Tests that the machine-code lint accepts the GPU kernels and reports planted faults."""

import functools
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from namernn_fast.gpu import kernels  # noqa: E402
from tools.gpu import resources  # noqa: E402
from tools.gpu.machine_code import Code, Counts  # noqa: E402
from tools.lint import rules  # noqa: E402
from tools.lint.__main__ import Result, differences, lint  # noqa: E402
from tools.lint.variants import CALLS, DEVICES, USUAL, Variant, variants  # noqa: E402

ALL = list(variants())


def variant(arch, precision, kind, kernel="forward") -> Variant:
    """Returns the largest matching variant with at most 512 hidden units."""
    found = [
        variant
        for variant in ALL
        if (variant.build.device.arch, variant.build.precision) == (arch, precision)
        and (variant.build.plan.kind, variant.kernel, variant.rows) == (kind, kernel, USUAL)
        and variant.build.hidden_size <= 512
    ]
    return max(found, key=lambda variant: variant.build.hidden_size)


@functools.cache
def compiled(variant: Variant) -> rules.Built:
    return rules.build(variant)


def broken(built: rules.Built) -> set[str]:
    """Returns the names of the lint rules that a compiled kernel breaks."""
    return {finding.rule for finding in rules.check(built)}


COOPERATIVE = variant("sm_90", "float32", "cooperative")
STREAMED = variant("sm_80", "float32", "streamed")
TF32 = variant("sm_90", "TF32", "cooperative")
SAMPLE = [
    STREAMED,
    variant("sm_86", "bfloat16", "cooperative", "backward"),
    COOPERATIVE,
    variant("sm_100", "TF32", "streamed"),
    variant("sm_120", "bfloat16", "resident"),
]
OTHER_ROWS = [variant for variant in ALL if variant.rows != USUAL]


@pytest.mark.covering(0)
@pytest.mark.parametrize("variant", SAMPLE + OTHER_ROWS, ids=lambda variant: variant.name)
def test_kernels_obey_all_lint_rules(variant):
    assert lint(variant).findings == []


def test_instruction_counts_match_the_record():
    record = json.loads(resources.RAW.read_text(encoding="utf-8"))
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record was made with Triton {record['triton']}")
    counts = compiled(COOPERATIVE).code.count()
    assert list(differences(Result(COOPERATIVE, [], counts), record)) == []


def test_variants_cover_all_kinds_of_plans_and_calls():
    met = {(variant.build.device.arch, variant.build.plan.kind, variant.kernel) for variant in ALL}
    rows = {(variant.build.plan.kind, variant.kernel, variant.rows) for variant in ALL}
    for kind in ("resident", "cooperative", "streamed"):
        for kernel in resources.KERNELS:
            assert all((device.arch, kind, kernel) in met for device in DEVICES)
            assert all(
                (kind, kernel, call) in rows or (kernel, call) == ("backward", "ids")
                for call in CALLS
            )
    names = [variant.name for variant in ALL]
    assert len(set(names)) == len(names)


OF_DIRECTION = "of_direction(weight_hh, weight_hh_reverse, program, FORM)"
PLACE = "place = _place(t, row, program, FORM)"
DIVIDED = "place = _place(t, row // program.time_stride, program, FORM)"
PRODUCT = "right, sum, input_precision=FORM.PRECISION"
# Mutants by name. Each has a variant, a text in the kernels' source, a replacement for this text,
# and the rule that the changed kernel breaks.
MUTANTS = {
    "reads weights in every step": (
        *(COOPERATIVE, "hx, step, right, n, program, FORM)\n            h ="),
        f"hx, step, kept_tile({OF_DIRECTION}, n, True, FORM), n, program, FORM)\n            h =",
        "weights",
    ),
    **{
        f"divides in 64 bits on {arch}": (
            variant(arch, "float32", "cooperative"),
            PLACE,
            DIVIDED,
            "call",
        )
        for arch in ("sm_80", "sm_90", "sm_100", "sm_120")
    },
    "rounds float32 to TF32": (
        *(variant("sm_80", "float32", "streamed"), PRODUCT, 'right, sum, input_precision="tf32"'),
        "tensor",
    ),
    "multiplies TF32 without tensor cores": (
        *(variant("sm_80", "TF32", "streamed"), PRODUCT, 'right, sum, input_precision="ieee"'),
        "tensor",
    ),
    "indices of sequences in 32 bits": (
        *(COOPERATIVE, "tl.arange(0, FORM.BLOCK_B)).to(tl.int64)", "tl.arange(0, FORM.BLOCK_B))"),
        "index",
    ),
}


def mutant(folder: Path, name: str, old: str, new: str):
    """Imports a copy of the kernels' source in which `old` is replaced by `new`."""
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_breaks_its_rule(name, tmp_path):
    variant, old, new, rule = MUTANTS[name]
    planted = mutant(tmp_path, name, old, new)
    assert broken(rules.build(variant, getattr(planted, f"{variant.kernel}_kernel"))) == {rule}


def test_an_unexpected_register_spill_breaks_a_rule(monkeypatch):
    spilled = rules.build(COOPERATIVE, maxnreg=64)
    assert broken(spilled) == {"local"}
    monkeypatch.setattr(rules, "SPILLING", {"float32 H512 .* forward": "it is known"})
    assert broken(spilled) == set()


def test_a_time_loop_with_more_instructions_than_recorded_is_reported(tmp_path):
    planted = mutant(tmp_path, "worse", "h = activation(z,", "h = activation(tl.exp(z),")
    before = compiled(COOPERATIVE).code.count()
    build = COOPERATIVE.build
    row = {"arch": "sm_90", "dtype": "float32", "hidden_size": build.hidden_size}
    row |= {"plan": build.plan._asdict(), "forward": before._asdict()}
    counts = rules.build(COOPERATIVE, planted.forward_kernel).code.count()
    assert counts.instructions > before.instructions
    (worse,) = differences(Result(COOPERATIVE, [], counts), {"rows": [row]})
    recorded = f"but {before.instructions} recorded"
    assert worse == ("budget", f"{counts.instructions} instructions in a step, {recorded}")
    assert list(differences(Result(COOPERATIVE, [], before), {"rows": [row]})) == []


@pytest.mark.parametrize("more", [{"shared": 2**20}, {"registers": 255 * 8}], ids=str)
def test_a_program_too_large_for_the_gpu_breaks_a_rule(more):
    built = compiled(COOPERATIVE)
    assert broken(built._replace(taken=built.taken._replace(**more))) == {"limits"}


def test_a_kernel_whose_source_is_missing_breaks_the_weights_rule(tmp_path):
    """The rule needs the source lines to determine which loads read weights."""
    assert broken(compiled(COOPERATIVE)._replace(source=tmp_path)) == {"weights"}


def test_a_kernel_without_recorded_counts_is_reported():
    result = Result(COOPERATIVE, [], compiled(COOPERATIVE).code.count())
    (finding,) = differences(result, {"rows": []})
    assert finding == ("budget", "is not recorded: run make gpu ONLY=report RECORD=1")


TEXT = """
.text.kernel:
	//## File "/kernels/primitives.py", line 7 inlined at "/kernels/forward.py", line 3
	//## File "/kernels/forward.py", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   SHFL.BFLY PT, R2, R0, 0x1, 0x1f ;
        /*0020*/                   BRA.DIV ~URZ, `(.L_x_4) ;
        /*0030*/                   BSSY B0, `(.L_x_2) ;
.L_x_1:
	//## File "/kernels/forward.py", line 4
        /*0040*/                   LDG.E.STRONG.GPU R4, desc[UR8][R6.64+0x10] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   BSYNC B0 ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/              @!P1 CALL.REL.NOINC `(.L_x_5) ;
        /*00b0*/                   BRA `(.L_x_0) ;
.L_x_5:
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   WARPSYNC.COLLECTIVE R9, `(.L_x_1) ;
        /*00e0*/                   BRA `(.L_x_1) ;
$__internal_0_$__cuda_sm20_div_s64:
        /*00f0*/                   BRA `(.L_x_0) ;
"""


def test_the_lint_finds_loops_calls_and_counts_in_machine_code():
    code = Code(TEXT)
    # A step contains neither the target of BRA.DIV nor the instruction after BSYNC.
    step = [0x10, 0x20, 0x30, 0x40, 0x60, 0x70, 0x90, 0xA0, 0xB0]
    assert [instruction.offset for instruction in code.step] == step
    assert [len(loop) for loop in code.loops] == [9, 2]
    first, load = code.instructions[0], code.step[3]
    assert (first.name, first.operands, first.calls) == (
        "S2R",
        "R0, SR_TID.X",
        (("forward.py", 3),),
    )
    assert (load.guard, load.opcode, load.calls) == ("", "LDG", ())
    assert code.count() == Counts(
        instructions=9, in_loops=2, shuffles=1, barriers=1, global_accesses=1, tensor=0
    )
    with pytest.raises(ValueError, match="no instruction"):
        Code("nothing")


def test_a_kernel_without_a_time_loop_breaks_a_rule():
    straight = Code("/*0000*/ EXIT ;")
    assert broken(compiled(COOPERATIVE)._replace(code=straight)) == {"loop"}
