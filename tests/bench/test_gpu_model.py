"""The model of the GPU kernels: its parts on code with known answers, and its page."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.gpu import grid, h100, latency, launches, memory, model, model_page, rivals
from benchmarks.gpu.lint.flow import Flow
from benchmarks.gpu.lint.sass import parse
from benchmarks.harness.grid import DENSE, FORWARD, PACKED, TRAINING, Cell
from benchmarks.harness.paths import GPU_MODEL

ARITHMETIC, SHARED, L2 = (h100.LATENCIES[name].value for name in ("arithmetic", "shared", "global"))
SMALL = Cell(DENSE, FORWARD, 1, 64, 64, 8)


def code_of(text):
    """Returns code as nvdisasm prints it, from one instruction or label a line."""
    lines = []
    for i, line in enumerate(text.split("\n")):
        line = line.strip()
        lines.append(line if line.endswith(":") else f"/*{16 * i:04x}*/ {line} ;")
    return Flow(parse("\n".join(line for line in lines if line != ";")))


def cycles_of(body, turns=()):
    """Returns the cycles of an iteration of the outermost loop of some code.

    Args:
        body: The code within the loop.
        turns: How often inner loops run, in the order of their code.
    """
    flow = code_of(f".L_x_0:\n{body.strip()}\n@P0 BRA `(.L_x_0)\nEXIT")
    (outer,) = flow.outermost
    inner = sorted(flow.inner(outer), key=lambda loop: loop.header)
    path = latency.path_of(flow, outer, dict(zip(inner, turns, strict=True)))
    return latency.cycles_of_an_iteration(flow.instructions, path)


BRANCH = 1  # cycle, of the branch at the end of the loop


def test_a_chain_waits_for_each_result():
    chain = "FFMA R0, R0, R1, R2\nFFMA R0, R0, R1, R2\nFFMA R0, R0, R1, R2"
    assert cycles_of(chain) == 3 * ARITHMETIC
    assert cycles_of("SHFL.BFLY PT, R0, R0, 0x1, 0x1f") == h100.LATENCIES["shuffle"].value
    assert cycles_of("MUFU.EX2 R0, R0") == h100.LATENCIES["special"].value


def test_independent_instructions_take_a_cycle_each():
    body = "\n".join(f"FFMA R{i}, R100, R101, R102" for i in range(10))
    assert cycles_of(body) == 10 + BRANCH


def test_a_place_holder_takes_nothing():
    assert cycles_of("@!PT FFMA R0, R1, R2, R3\nFFMA R4, R5, R6, R7") == 1 + BRANCH


def test_what_is_loaded_a_step_ahead_costs_nothing():
    work = "\n".join(["FFMA R0, R0, R1, R2"] * 60)
    used_at_once = f"LDG.E R8, desc[UR8][R4.64]\nFADD R9, R8, R8\n{work}"
    used_later = f"FADD R9, R8, R8\nLDG.E R8, desc[UR8][R4.64]\n{work}"
    assert 60 * ARITHMETIC > L2
    assert cycles_of(used_later) == pytest.approx(60 * ARITHMETIC, abs=2)
    assert cycles_of(used_at_once) == pytest.approx(L2 + 60 * ARITHMETIC, abs=2)


def test_a_predicate_is_waited_for():
    body = "LDS R0, [R1]\nISETP.NE.AND P1, PT, R0, RZ, PT\n@P1 FADD R2, R3, R4"
    assert cycles_of(body) == pytest.approx(SHARED + ARITHMETIC + 1 + BRANCH)


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier"),
        ("MEMBAR.ALL.GPU", "fence"),
        ("REDG.E.ADD.STRONG.GPU desc[UR8][R4.64], R21", "atomic"),
    ],
)
def test_what_holds_a_warp_up(instruction, name):
    assert cycles_of(instruction) == pytest.approx(h100.LATENCIES[name].value + BRANCH)


def test_a_fence_of_the_program_alone_is_cheap():
    assert cycles_of("MEMBAR.ALL.CTA") == 1 + BRANCH


def test_copies_run_on_until_the_code_waits():
    copy = "LDGSTS.E.BYPASS.128 [R13], desc[UR8][R4.64]\nLDGDEPBAR"
    assert cycles_of(f"{copy}\nDEPBAR.LE SB0, 0x0") == pytest.approx(L2 + BRANCH)
    # A group stays on its way: each step waits for the copy of the step before it.
    work = "\n".join(["FFMA R0, R0, R1, R2"] * 40)
    assert 40 * ARITHMETIC < L2
    one_ahead = cycles_of(f"{copy}\n{work}\nDEPBAR.LE SB0, 0x1")
    assert one_ahead == pytest.approx(40 * ARITHMETIC, abs=3)
    # More may stay on their way than there are.
    warp = latency.Warp()
    for at in code_of("\n".join([copy] * 3 + ["DEPBAR.LE SB0, 0x4", "EXIT"])).instructions:
        warp.execute(at)
    assert warp.clock == 8


def test_tensor_cores():
    of_one = "HMMA.16816.F32.BF16 R0, R20, R24, R0"
    assert cycles_of(of_one) == h100.LATENCIES["tensor"].value
    occupied = 16 * 8 * 16 / (2048 / 4 * h100.rate("hmma"))
    body = "\n".join(f"HMMA.16816.F32.BF16 R{4 * i}, R200, R204, R{4 * i}" for i in range(16))
    assert cycles_of(body) == pytest.approx(16 * occupied, rel=0.1)
    # Products of warp groups do not wait for each other's sums, and the code waits for all.
    of_four = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24"
    body = "\n".join([of_four] * 7 + [f"{of_four}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"])
    assert cycles_of(body) == pytest.approx(
        8 * 64 * 64 * 16 / 2048, abs=h100.LATENCIES["tensor"].value
    )


def test_an_inner_loop_runs_as_often_as_it_does(monkeypatch):
    body = """
        FADD R9, R9, R9
        .L_x_1:
        LDS R1, [R2]
        FFMA R0, R1, R1, R0
        @P1 BRA `(.L_x_1)
        FADD R3, R0, R9
    """
    many = cycles_of(body, [100])
    assert many > 100 * SHARED
    monkeypatch.setattr(latency, "_TURNS", 1000)
    assert cycles_of(body, [100]) == pytest.approx(many)


def test_code_at_the_end_of_the_kernel_is_executed_where_it_branches_from():
    # Block 2 lies behind the loop, and gives R1 to what follows the branch to it.
    flow = code_of(
        """
        .L_x_0:
        @P1 BRA `(.L_x_2)
        .L_x_1:
        FADD R2, R1, R1
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        LDS R1, [R3]
        BRA `(.L_x_1)
        """
    )
    (loop,) = flow.loops
    opcodes = [flow.instructions[place].opcode for place in latency.path_of(flow, loop, {})]
    assert opcodes == ["BRA", "LDS", "BRA", "FADD", "BRA"]


@pytest.mark.parametrize(
    ("stride", "size", "rows", "least"),
    [
        (0, 4, 1, 1),  # one word for all lanes
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),  # one bank for all lanes
        (132, 4, 1, 1),  # padded
        (16, 16, 4, 4),
        (128, 16, 32, 4),
        (2, 2, 1, 1),  # two lanes a word
    ],
)
def test_rows_of_banks(stride, size, rows, least):
    addresses = [1024 + stride * lane for lane in range(32)]
    assert memory.access_of(addresses, size) == (rows, least)


@pytest.mark.parametrize(
    ("stride", "size", "sectors"),
    [(0, 4, 1), (4, 4, 4), (16, 16, 16), (32, 4, 32), (64, 16, 32), (2, 2, 2), (48, 16, 32)],
)
def test_sectors(stride, size, sectors):
    assert memory.sectors_of([1024 + stride * lane for lane in range(32)], size) == sectors


def facts_of(**changed):
    zeros = dict.fromkeys(model.Facts._fields, 0)
    return model.Facts(**zeros | {"latency": 1000.0, "resident": 2} | changed)


def test_a_step_takes_the_largest_bound():
    plan = model.plan_of(SMALL, "float32")
    assert (plan.block_b, plan.warps) == (1, 4)

    def step(batch, **changed):
        found = model.step(facts_of(**changed), plan, batch, 64, 4)
        return round(found.seconds * h100.rate("clock")), found.bound

    assert step(1) == (1000, "latency")
    assert step(1, instructions=900) == (1000, "latency")
    assert step(1, instructions=1100) == (1100, "instructions")
    # Two programs on an SM; then programs take turns, the last of which are alone on theirs.
    assert step(264, instructions=900) == (1800, "instructions")
    assert step(265, instructions=900) == (2800, "instructions")
    assert step(132, bank_rows=1500)[1] == "shared memory"
    cycles, bound = step(264, global_bytes=10**6)
    assert bound == "L2"
    assert cycles == round(264e6 / h100.rate("l2") * h100.rate("clock"))
    assert step(1, global_bytes=128_000) == (2000, "L2 port")


def test_sequences_that_do_not_exist_are_not_read():
    facts = facts_of(global_bytes=128_000 * 16)
    plan = model.plan_of(SMALL, "bfloat16")
    assert (plan.kind, plan.block_b) == ("resident", 16)
    few, all_of_them = (model.step(facts, plan, batch, 64, 2).seconds for batch in (1, 16))
    assert 16 * few == pytest.approx(all_of_them)


def test_names_end():
    cell = Cell(PACKED, FORWARD, 1000, 64, 256)
    steps = model.alive(cell)
    assert steps[0] == 1000
    assert steps == sorted(steps, reverse=True)
    assert len(steps) == max(model.lengths())
    assert model.batch_sizes_of(cell).tolist() == steps


def test_what_pytorch_runs():
    def chosen(hidden_size, family=DENSE):
        cell = Cell(family, TRAINING, 1, 64, hidden_size, 8)
        return [rivals.algorithm(cell, kernel) for kernel in ("forward", "backward")]

    assert chosen(256) == [rivals.SMALL_H] * 2
    assert chosen(384) == [rivals.SMALL_H, rivals.STANDARD]
    assert chosen(385) == [rivals.STANDARD] * 2
    assert chosen(64, PACKED) == [rivals.STANDARD] * 2


def test_a_loop_of_library_calls():
    large = rivals.loop(Cell(DENSE, FORWARD, 4096, 4096, 4096, 8), "float32")
    at_peak = 4096**3 / (128 * 132 * h100.rate("clock"))
    assert large.product == pytest.approx(at_peak)
    assert large.gap_of_a_tie(large.seconds) == pytest.approx(h100.rate("node"))
    small = rivals.loop(SMALL, "bfloat16")
    assert small.seconds == pytest.approx(2 * h100.rate("node"), rel=0.01)


@pytest.mark.parametrize("precision", grid.PRECISIONS, ids=lambda precision: precision.name)
def test_the_kernels_of_a_call(precision):
    found = launches.launched(SMALL, precision, None)
    assert found[-1] == "forward_kernel"
    cooperative = launches.launched(Cell(DENSE, FORWARD, 1, 512, 512, 8), precision, None)
    assert len(cooperative) == len(found) + 1  # the counters at which programs meet
    training = launches.launched(replace(SMALL, mode=TRAINING), precision, None)
    assert training[: len(found)] == found
    assert training.count("backward_kernel") == 1
    packed = launches.launched(Cell(PACKED, FORWARD, 4, 64, 64), precision, torch.tensor([4, 2]))
    assert packed[-1] == "forward_kernel"


@pytest.fixture(scope="module")
def record():
    return model_page.load()


def test_the_page_is_up_to_date(record):
    assert GPU_MODEL.read_text(encoding="utf-8") == model_page.page(record), (
        "run make gpu-model RECORD=1"
    )


def test_a_model_of_the_page_is_a_bound(record):
    for precision in grid.PRECISIONS:
        for cell in model_page.SHAPES:
            a_step = record.step(cell, precision.name, "forward")
            steps = len(model.alive(cell))
            graph = record.graph_seconds(cell, precision.name)
            assert math.isfinite(graph)
            if cell.seq_len is not None:
                assert graph > steps * a_step.seconds
            mended = record.step(cell, precision.name, "forward", conflicts=False)
            assert mended.seconds <= a_step.seconds


STREAMED = Cell(DENSE, FORWARD, 1024, 64, 256, 8)


@pytest.mark.parametrize(
    ("cell", "precision"), [(SMALL, "float32"), (SMALL, "bfloat16"), (STREAMED, "tf32")], ids=str
)
@pytest.mark.parametrize("kernel", model_page.KERNELS)
def test_a_sample_of_the_record_is_up_to_date(record, cell, precision, kernel):
    if triton.__version__ != record.triton:
        pytest.skip(f"the record is of Triton {record.triton}")
    case = model.case_of(cell, precision, kernel)
    assert record.facts[case.name] == model.facts_of(case), "run make gpu-model RECORD=1"


def test_products_count_as_often_as_they_run(record):
    for precision in ("bfloat16", "tf32"):
        for cell in model_page.SHAPES:
            case = model.case_of(cell, precision, "forward")
            plan, inner = case.build.plan, cell.hidden_size
            of_a_step = plan.block_b * plan.block_n * plan.tiles * inner
            at_peak = of_a_step / h100.rate(precision)
            found = record.facts[case.name].tensor_cycles
            assert found == pytest.approx(at_peak) or (
                found == pytest.approx(at_peak / h100.rate("hmma"))
            ), case.name


@pytest.mark.parametrize("cell", [SMALL, replace(SMALL, mode=TRAINING)], ids=str)
def test_a_sample_of_the_launches_is_up_to_date(record, cell):
    found = launches.launched(cell, grid.FLOAT32, None)
    assert record.kernels(cell, "float32") == found, "run make gpu-model RECORD=1"


def test_tiles_without_tensor_cores_have_no_bank_conflicts():
    cell = Cell(DENSE, FORWARD, 1024, 256, 256, 8)
    for kernel in ("forward", "backward"):
        facts = model.facts_of(model.case_of(cell, "float32", kernel))
        assert facts.bank_rows == facts.least_bank_rows > 0
