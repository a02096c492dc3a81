"""Tests the benchmarks: what they compute, time and check, and where they write results."""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from kinds import KINDS, flat
from torch.nn.utils.rnn import pack_sequence

from benchmarks.cpu import (
    eight_bits,
    leaky,
    memory,
    peers,
    prepared,
    roofline,
    steps,
    streams,
)
from benchmarks.cpu import grid as cpu_grid
from benchmarks.cpu import run as cpu_run
from benchmarks.harness import pages, paths
from benchmarks.harness.grid import (
    DENSE,
    FORWARD,
    FUSED,
    GATED_CELLS,
    MODES,
    PACKED,
    TRAINING,
    WORKLOADS_OF_EVERY_RUN,
    Workload,
)
from benchmarks.harness.pages import write_section
from benchmarks.harness.paths import PERFORMANCE_TABLES, ROOT, Section
from benchmarks.harness.spread import speed_up_interval
from benchmarks.harness.study import AGAIN, Study
from benchmarks.report import speed
from namernn_fast import FusedLeakyRNN, Stream, explain
from namernn_fast.bench import timed_calls
from namernn_fast.bench.race import QUICK, TimeBudget, race
from namernn_fast.bench.tables import TIMES, markdown
from namernn_fast.bench.workloads import LAYERS_OF
from namernn_fast.cells import CELLS
from namernn_fast.testing import BudgetError, ErrorBudget

EVERY_CELL = pytest.mark.parametrize("cell", LAYERS_OF)


@EVERY_CELL
@pytest.mark.parametrize("packed", [False, True])
def test_training_steps_backpropagate_from_all_results(packed, cell):
    layer = timed_calls.CLASSES[cell][0](4, 5, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, 4)
    if packed:
        x = pack_sequence([x[:n, 0] for n in (6, 2, 5)], enforce_sorted=False)
    gradients = timed_calls.draw_gradients(layer, x)
    timed_calls.call_of(layer, x, TRAINING, gradients)()
    output, *states = flat(layer(x))
    results = (output.data if packed else output, *states)
    loss = sum((value * grad).sum() for value, grad in zip(results, gradients, strict=True))
    wanted = torch.autograd.grad(loss, [*layer.parameters()])
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@EVERY_CELL
@pytest.mark.parametrize("mode", MODES)
def test_the_correctness_check_can_use_a_subset_of_a_batch(mode, cell, monkeypatch):
    workload = Workload(DENSE, mode, 5, 4, 3, 6, cell)
    x, rows = torch.randn(6, 5, 4), torch.tensor([0, 3])
    calls = timed_calls.gated_calls(workload, x, rows)
    baseline, fused = timed_calls.CLASSES[cell]
    assert [*calls] == [f"nn.{baseline.__name__}", fused.__name__]
    for call in calls.values():
        call()

    class Wrong(fused):
        def forward(self, *arguments, **options):
            output, states = super().forward(*arguments, **options)
            return output + 1e-3, states

    monkeypatch.setitem(timed_calls.CLASSES, cell, (baseline, Wrong))
    with pytest.raises(BudgetError, match="output: error"):
        timed_calls.gated_calls(workload, x, rows)


options = functools.partial(argparse.Namespace, threads=2, record=False, quick=True, seconds=0)


def test_timing_over_budget_runs_the_minimum_number_of_rounds():
    calls = []
    raced = {name: functools.partial(calls.append, name) for name in "ab"}
    rounds = race(raced, TimeBudget(seconds=0, warmup_seconds=0, round_seconds=0))
    assert [len(rounds[name].seconds) for name in "ab"] == [7, 7]
    assert "".join(calls) == "ab" + "abba" * 3 + "ab"


def test_the_confidence_interval_ignores_drift_and_outliers():
    drift = [1.0, 2.0, 1.5, 1.1, 4.0, 2.5, 1.7]
    assert speed_up_interval([2 * seconds for seconds in drift], drift) == (2.0, 2.0)
    theirs = [2.0, 2.2, 1.8, 2.1, 1.9, 2.05, 40.0]
    low, high = speed_up_interval(theirs, [1.0] * 7)
    assert 1.8 <= low < statistics.median(theirs) < high <= 2.2


@EVERY_CELL
@pytest.mark.parametrize("mode", MODES)
def test_other_implementations_agree_with_the_oracle(mode, cell):
    # JAX is not tested: it starts threads, so a later test could not safely fork this process.
    rivals = [r for r in peers.available() if r in ("PyTorch in place", "NumPy", "onnxruntime")]
    found = peers.calls(Workload(DENSE, mode, 3, 4, 5, 6, cell), rivals)
    assert [*found] == [*LAYERS_OF[cell], *(rivals if mode == FORWARD else ())]
    assert all(map(callable, found.values()))  # what is wrong with a rival is no call
    assert [*peers.calls(Workload(PACKED, mode, 3, 4, 5, 12, cell))] == [*LAYERS_OF[cell]]


RACES = {  # the study, and where the limit of a rival's error is
    "peers": (
        dataclasses.replace(peers.STUDY, calls=functools.partial(peers.calls, rivals=["NumPy"])),
        (peers, "ERROR"),
    ),
    "prepared": (prepared.STUDY, (prepared, "ERROR")),
    "streams": (streams.STUDY, (prepared, "ERROR")),
    "eight_bits": (eight_bits.STUDY, (eight_bits, "MAX_RIVAL_ERROR")),
}
RACED = {"peers": {"NumPy"}, "prepared": {"onnxruntime"}, "streams": {"onnxruntime"}}
RACED_IN_8_BITS = {"rnn": set(), "gru": {"torch.ao"}, "lstm": {"torch.ao", "onnxruntime"}}


@EVERY_CELL
@pytest.mark.parametrize(
    ("study", "limit"),
    [
        pytest.param(*race, id=name, marks=[] if name == "peers" else pytest.mark.slow)
        for name, race in RACES.items()
    ],
)
def test_an_inaccurate_rival_is_reported_and_not_timed(study, limit, cell, monkeypatch):
    """The run does not fail, because a rival may be inaccurate only on some processors."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(prepared, "RUNTIMES", ("onnxruntime",))  # OpenVINO may not be installed
    monkeypatch.setattr(*limit, 0.0)
    case = next(case for case in study.cases if (case.cell, case.mode) == (cell, FORWARD))
    failures = []
    (row,) = Study.run_on(dataclasses.replace(study, cases=[case]), 2, options(), failures)
    assert not failures
    rivals = RACED.get(study.name, RACED_IN_8_BITS[cell])
    assert row.get("wrong", {}).keys() == rivals
    assert row["medians"]
    assert not row["medians"].keys() & rivals
    document = {"cpu": "a processor", "threads": [2], "rows": [row], "others": []}
    document |= {"float32": "a kernel", "int8": "another", "empty_operator": 1e-6}
    document |= {"hop": 5e-8, "hop_median": 6e-8}
    text = study.report(document)
    for name in rivals:
        assert f"{name} is wrong in 1 of 1 rows, and not timed there: {name} is off by" in text


def test_errors_of_perturbed_runs_increase_the_error_budget():
    """The budget grows with the root mean square, over samples, of each sample's largest error."""
    exact, ours = np.zeros(2), torch.tensor([0.0, 6.0], dtype=torch.float64)
    budget = ErrorBudget(ours.dtype)
    budget.add("h", ours, torch.zeros_like(ours), exact)
    for sample, distance in [(0, 1.0), (0, 0.5), (1, 2.0)]:
        budget.add_nearby("h", sample, exact + np.array([0, distance]), exact)
    with pytest.raises(BudgetError, match=r"h: error 6 exceeds its budget 3\.16"):
        budget.check()
    budget.add_nearby("h", 2, exact - 5, exact)
    budget.check()


@EVERY_CELL
def test_row_work_includes_the_weights_of_every_gate(cell):
    layer = timed_calls.CLASSES[cell][0](3, 5, bias=False)
    weights = sum(p.numel() for p in layer.parameters())
    assert Workload(DENSE, FORWARD, 2, 3, 5, 4, cell).row_work == 4 * weights
    assert CELLS[cell].gates * 5 == len(layer.weight_hh_l0)


@pytest.fixture
def rows_of(monkeypatch, threads):
    """Returns a function that runs a study twice, and returns the rows of the first run.

    Before the second run, `fault` is passed to `monkeypatch.setattr`. The function asserts that the
    study then reports the fault in every case and times no case.
    """

    def run(study, cases, fault, message):
        study, failures = dataclasses.replace(study, cases=cases), []
        rows = study.run(options(), failures)
        assert not failures
        monkeypatch.setattr(*fault)
        assert not study.run(options(), failures)
        assert len(failures) == len(rows)
        assert all(message in failure for failure in failures)
        return rows

    return run


@pytest.mark.covering(0)
@EVERY_CELL
def test_wrong_steps_are_not_timed(cell, rows_of):
    theirs, ours = steps.MODULES[cell]

    class Wrong(ours):
        def forward(self, *arguments):
            return torch.utils._pytree.tree_map(lambda h: h + 1e-3, super().forward(*arguments))

    cases = [Workload(DENSE, mode, 1, size, size, 1, cell) for size in (8, 64) for mode in MODES]
    rows = rows_of(steps.STUDY, cases, (steps, "MODULES", {cell: (theirs, Wrong)}), "h: error")
    assert len(rows) == len(cases)
    with torch.inference_mode():
        assert rows[0]["path"] == explain(ours(8, 8), torch.randn(1, 8)).path
    assert steps.STUDY.table(rows).count(TIMES) == 4 + 4  # a mean and a worst for each mode


def test_the_study_of_streams_times_an_empty_operator(monkeypatch):
    monkeypatch.setattr(streams, "timed", lambda call, times: (call(), 1e-6)[1])
    assert streams.STUDY.facts() == {"empty_operator": 1e-6}


@pytest.mark.slow
@pytest.mark.covering(0)
@EVERY_CELL
def test_wrong_streams_are_not_timed(cell, monkeypatch, rows_of):
    monkeypatch.setattr(streams, "runtime_calls", lambda _: {})
    call = Stream.__call__
    fault = (Stream, "__call__", lambda *each, **out: call(*each, **out) + 1e-3)
    cases = [Workload(DENSE, FORWARD, 2, 64, 64, 1, cell)]
    (row,) = rows_of(streams.STUDY, cases, fault, "output: error")
    assert (row["cell"], row["threads"]) == (cell, 2)
    assert 0 < row["floor"] < 1
    assert streams.STUDY.table([row]).count(TIMES) == 3


@pytest.mark.slow
def test_wrong_leaky_layers_are_not_timed(monkeypatch, rows_of):
    def layers(nonlinearity):  # nn4n is not installed in tests
        sizes = leaky.INPUT_SIZE, leaky.HIDDEN_SIZE
        return KINDS["leaky"].twins(*sizes, nonlinearity=nonlinearity)[::-1]

    monkeypatch.setattr(leaky, "layers", layers)
    forward = FusedLeakyRNN.forward
    fault = (FusedLeakyRNN, "forward", lambda *a, **k: (forward(*a, **k)[0] + 1e-3, None))
    rows = rows_of(leaky.STUDY, leaky.STUDY.cases[::4], fault, "output: error")
    assert [row["nonlinearity"] for row in rows] == ["relu", "tanh"]
    text = leaky.STUDY.report({"cpu": "a processor", "threads": [2], "rows": rows})
    assert text.count(TIMES) == 3 * (2 + 2)  # a mean and a worst


@pytest.mark.slow
@pytest.mark.covering(0)
@EVERY_CELL
@pytest.mark.parametrize("calls", [eight_bits.LAYERS, eight_bits.STREAMS])
def test_inaccurate_8_bit_weights_are_not_timed(calls, cell, rows_of):
    cases = [eight_bits.Quantized(DENSE, FORWARD, 2, 64, 64, 1, cell, calls=calls)]
    fault = (eight_bits, "MAX_ERROR", 1e-6)  # less than what rounding to 8 bits causes
    (row,) = rows_of(eight_bits.STUDY, cases, fault, "int8 is off by")
    assert row["medians"].keys() == {"float32", *row["errors"]}
    assert eight_bits.STUDY.table([row]).count(TIMES) == len(row["errors"])


def test_workload_flops_match_a_count_of_all_products():
    size, hidden, steps, batch = 3, 5, 4, 2
    count = 0
    for t in range(steps):
        count += batch * hidden * size  # x_t W_ih
        if t:
            count += batch * hidden * hidden  # h_{t-1} W_hh
    assert roofline.flops(Workload(DENSE, FORWARD, batch, size, hidden, steps)) == 2 * count
    for t in range(steps):
        count += batch * hidden * size  # dz^T x
        if t:
            count += 2 * batch * hidden * hidden  # dz W_hh, dz^T h_{t-1}
    assert roofline.flops(Workload(DENSE, TRAINING, batch, size, hidden, steps)) == 2 * count


@pytest.mark.slow
def test_a_recorded_run_also_times_one_thread(monkeypatch):
    monkeypatch.setattr(pages, "time_budget", lambda *_: QUICK)
    study = dataclasses.replace(steps.STUDY, cases=steps.STUDY.cases[:1])
    rows = study.run(options(record=True, quick=False), [])
    assert [row["threads"] for row in rows] == [1, 2]
    assert all(len(times) >= QUICK.min_rounds for row in rows for times in row["seconds"].values())


def test_bytes_read_include_every_weight_once_per_step():
    # With initial states, the first step also reads weight_hh.
    assert eight_bits.bytes_read(Workload(DENSE, FORWARD, 2, 5, 3, 4)) == 3 * (5 + 8) + 4 * 3 * (
        3 + 8
    )


def test_every_cell_of_the_divider_row_has_a_dash():
    assert markdown([["a", "B"], ["b", "1"]]) == "| a  |  B |\n| -- | -: |\n| b  |  1 |"


def test_writing_a_section_keeps_the_rest_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: begin -->\nold\n<!-- one: end -->\nb\n")
    write_section(page, "one", "new")
    assert page.read_text(encoding="utf-8") == "a\n<!-- one: begin -->\nnew\n<!-- one: end -->\nb\n"
    with pytest.raises(SystemExit, match=r"page\.md has no section between"):
        write_section(page, "two", "new")
    assert "new" in page.read_text(encoding="utf-8")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Makes benchmarks write to folders in `tmp_path`, and returns `tmp_path`."""
    for name in ("RESULTS", "SCRATCH"):
        monkeypatch.setattr(pages, name, tmp_path / name.lower())
    return tmp_path


def test_a_run_of_the_grid_is_recorded_only_on_request(repository, monkeypatch):
    """A recorded run updates the pages and the results. Other runs write to a scratch folder."""
    workloads = [
        Workload(*sizes) for sizes in ((DENSE, FORWARD, 1, 4, 3, 2), (DENSE, FORWARD, 2, 4, 3, 2))
    ]
    study = small_grid(repository, workloads)
    monkeypatch.setattr(pages, "time_budget", lambda *_: QUICK)
    before = [section.page.read_text() for section in study.sections]
    plots = {"speedup_overview.png", "speedup_dense.png"}

    study.main(options(quick=False))
    written = {path.name for path in (repository / "scratch").iterdir()}
    assert written == {"grid.json", "grid.md", "classes.md", "speed.md", *plots}
    assert not (repository / "results").exists()
    assert before == [section.page.read_text() for section in study.sections]

    study.main(options(record=True, quick=False))
    assert {path.name for path in (repository / "results").iterdir()} == {"grid.json", *plots}
    table, by_class, summary = (section.page.read_text() for section in study.sections)
    assert "| (4, 3, 2)" in table
    assert "| all of these sizes" in by_class
    assert "The 2 workloads of" in summary
    assert "(benchmarks/results/speedup_overview.png)" in summary
    assert "second run" not in summary

    first = pages.recorded("grid")
    study.main(options(record=True, quick=False), again=True)
    second = pages.recorded("grid")
    assert {name: value for name, value in second.items() if name != AGAIN} == first
    assert len(second[AGAIN]) == 2
    table_again, _, summary_again = (section.page.read_text() for section in study.sections)
    assert table_again == table
    assert summary_again.replace(speed.repeatability(second), "") == summary
    assert "In a second run, the means differed by at most" in summary_again


def test_the_summary_compares_a_second_run():
    def row(batch, fused):
        workload = Workload(DENSE, FORWARD, batch, 4, 3, 2)
        return dataclasses.asdict(workload) | {"medians": {"nn.RNN": 1.0, "FusedRNN": fused}}

    rows = [row(batch, 0.5) for batch in (1, 2, 4)]
    again = [row(1, 0.5), row(2, 0.5 / 1.1), row(4, 0.5 * 1.21)]
    text = speed.repeatability({"rows": rows, AGAIN: again})
    # The factors 1, 1.1 and 1 / 1.21 have a geometric mean of 1.1 ** (-1 / 3).
    assert "means differed by at most 3 %" in text
    assert "typically by 10 % (at most 21 %)" in text
    # A workload whose second run failed its check is left out.
    assert "(at most 10 %)" in speed.repeatability({"rows": rows, AGAIN: again[:2]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--again"], "--again needs --record"),
        (["--again", "--record"], "the grid was recorded on"),
    ],
)
def test_a_second_run_needs_a_record_of_this_processor(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("sys.argv", ["grid", *arguments])
    monkeypatch.setattr(cpu_grid, "cpu_name", lambda: "another processor")
    with pytest.raises(SystemExit):
        cpu_grid.main()
    assert message in capsys.readouterr().err


def test_a_recorded_run_ends_with_the_grid_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_run, "SCRATCH", tmp_path)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("sys.argv", ["run", "--record"])
    commands = []

    def run(command, cwd):
        commands.append(command[2:])
        return Mock(returncode=0)

    monkeypatch.setattr(cpu_run.subprocess, "run", run)
    cpu_run.main()
    assert [name for name, *_ in commands].count("benchmarks.cpu.grid") == 2
    assert commands[-1][:2] == ["benchmarks.cpu.grid", "--again"]
    assert "--record=all" in commands[-1]


def small_grid(folder, workloads):
    """Returns the grid's study with the given workloads, and with its pages in `folder`."""
    study = dataclasses.replace(cpu_grid.STUDY, cases=workloads, few=lambda case: True)
    moved = [section._replace(page=folder / section.page.name) for section in study.sections]
    for page, name, _ in moved:
        page.write_text(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n")
    return dataclasses.replace(study, page=moved[0].page, more=moved[1:])


def test_a_wrong_workload_does_not_stop_other_workloads(repository, monkeypatch):
    """The other workloads are timed, but nothing is recorded."""
    monkeypatch.setattr(cpu_grid, "MOST_WIDTH", math.inf)
    gate = timed_calls.assert_within_budget
    by_batch = [
        Workload(DENSE, mode, batch, 3, 4, 5, cell)
        for cell in LAYERS_OF
        for mode in MODES
        for batch in (1, 16)
    ]
    monkeypatch.setattr(memory, "process_of", lambda layer: ThreadPoolExecutor(1))

    def planted(ours, theirs, oracle, **more):
        if ours["h_n"].shape[1] == 16 and "grad weight_ih_l0" not in ours:
            ours = ours | {"h_n": ours["h_n"] + 1e-3}
        gate(ours, theirs, oracle, **more)

    monkeypatch.setattr(timed_calls, "assert_within_budget", planted)
    monkeypatch.setattr(pages, "time_budget", lambda *_: QUICK)
    with pytest.raises(SystemExit) as left:
        small_grid(repository, by_batch).main(options(record=True, quick=False))
    assert not (repository / "results").exists()
    text = (repository / "scratch" / "grid.md").read_text(encoding="utf-8")
    for cell, (_, fused) in LAYERS_OF.items():
        part = text.partition(f"**{fused}**")[2].partition("\n**")[0]
        rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in part.splitlines()]
        entries = {row[1]: row[2:] for row in rows if len(row) > 5}
        assert entries["16"][:4] == [""] * 4
        assert all(entries["16"][4:])  # the other mode, and memory
        assert all(entries["1"])
        assert f"{Workload(DENSE, FORWARD, 16, 3, 4, 5, cell)}, 2 thread(s): h_n: error" in str(
            left.value
        )


def test_a_run_continues_after_a_program_fails(tmp_path, monkeypatch):
    """The run ends with an error that names the failed checks of each program."""
    monkeypatch.setattr(cpu_run, "SCRATCH", tmp_path)
    monkeypatch.setattr(cpu_run, "PROGRAMS", ("a.wrong", "a.broken", "a.right"))
    monkeypatch.setattr("sys.argv", ["run", "--quick", "--threads", "1", "--seconds", "2"])
    commands = []

    def run(command, cwd):
        commands.append(command[2:])
        if command[2] == "benchmarks.a.wrong":
            (tmp_path / "wrong.json").write_text('{"wrong": ["one", "two"]}')
        return Mock(returncode=int(command[2] != "benchmarks.a.right"))

    monkeypatch.setattr(cpu_run.subprocess, "run", run)
    with pytest.raises(SystemExit) as left:
        cpu_run.main()
    failed = ["wrong: one", "wrong: two", "broken: exited with status 1"]
    assert str(left.value).splitlines()[1:] == [f"benchmarks.a.{failure}" for failure in failed]
    also = ["--threads=1", "--quick"]
    assert commands == [
        ["benchmarks.a.wrong", "--seconds=2.0", *also],
        ["benchmarks.a.broken", *also],
        ["benchmarks.a.right", *also],
    ]


@pytest.mark.slow
def test_pytest_benchmark_times_layers(run_program, tmp_path):
    program = ("-m", "pytest", "benchmarks", "-k", "gru and forward- and H64 and B1 and D64")
    limits = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=1")
    limits += (f"--benchmark-json={tmp_path / 'times.json'}",)
    # In a pytest-xdist worker, pytest-benchmark would time nothing.
    run_program(*program, *limits, cwd=ROOT, PYTEST_XDIST_WORKER="")
    timed = json.loads((tmp_path / "times.json").read_text(encoding="utf-8"))["benchmarks"]
    assert {row["group"] for row in timed} == {"gru-dense-forward-D64-H64-T8-B1"}
    assert {row["params"]["role"] for row in timed} == {"baseline", "fused"}


def test_tables_of_the_grid_show_only_useful_intervals():
    def table(*intervals):
        rows = [
            {
                **dataclasses.asdict(Workload(DENSE, FORWARD, batch, 4, 3, 2)),
                "medians": {"nn.RNN": low * 1e-5, FUSED: 1e-5},
                "spread": {"nn.RNN": (low, high)},
            }
            for batch, (low, high) in enumerate(intervals, 1)
        ]
        return cpu_grid.table(rows)

    assert "| 1.20 to 1.30 |" in table((1.2, 1.3))
    assert table((1.2, 1.3)).endswith("FusedRNN is faster in all 1 workloads.")
    text = table((1.2, 1.3), (0.98, 1.01), (0.8, 0.9))
    assert "slower in 1 of 3 workloads: (4, 3, 2) B=3 forward 0.80×." in text
    assert "neither faster nor slower in 1 of 3 workloads: (4, 3, 2) B=2 forward (0.98 to" in text
    busy = table((1.2, 3.6))
    assert "The machine was busy: the upper end of an interval is typically 3.0 times" in busy
    assert "1.20 to 3.60" not in busy


def test_every_run_times_a_quarter_of_the_workloads():
    assert len(WORKLOADS_OF_EVERY_RUN) == pytest.approx(len(cpu_grid.STUDY.cases) / 4, abs=3)


@EVERY_CELL
def test_every_run_times_every_class_in_both_modes(cell):
    workloads = [workload for workload in WORKLOADS_OF_EVERY_RUN if workload.cell == cell]
    assert {workload.family for workload in workloads} == {DENSE, PACKED}
    for name, belongs in speed.CLASSES.items():
        assert {workload.mode for workload in workloads if belongs(workload)} == {*MODES}, name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("lengths", [(), (200,) * 10 + (40,) * 20], ids=["dense", "packed"])
@pytest.mark.parametrize("cell", GATED_CELLS)
def test_the_memory_of_a_training_step_includes_saved_tensors(cell, lengths):
    """A fused layer saves at least its output. Torch's layer saves several times as much."""
    rows = sum(lengths) if lengths else 30 * 200
    workload = Workload(DENSE, TRAINING, 30, 4, 128, None if lengths else 200, cell)
    peaks = memory.peaks_of_training(workload, 1, lengths)
    assert [*peaks] == [*workload.layers]
    baseline, fused = peaks.values()
    output = 4 * 128 * rows
    assert baseline > 4 * output
    assert output < fused < baseline


@pytest.fixture
def parsed(monkeypatch):
    """Returns a function that parses words of a command line as a benchmark's options."""
    parser = pages.parser("A program.", seconds=1.0)

    def parse(*words):
        monkeypatch.setattr("sys.argv", ["program", *words])
        return pages.parse(parser)

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return parse


def test_tables_of_avx2_are_recorded_separately(parsed, repository, monkeypatch, capsys):
    monkeypatch.setattr(pages.ops, "cpu_kernel", lambda: "avx512")
    with pytest.raises(SystemExit):
        parsed("--record", "avx2")
    assert "set ATEN_CPU_CAPABILITY=avx2" in capsys.readouterr().err
    monkeypatch.setattr(pages.ops, "cpu_kernel", lambda: "avx2")
    record = parsed("--record", "avx2").record

    page, other = repository / "avx2.md", repository / "other.md"
    for path in (page, other):
        path.write_text("<!-- one: begin -->\n<!-- one: end -->\n")
    monkeypatch.setattr(paths, "PERFORMANCE_AVX2", page)
    sections = [Section(to, "one", str) for to in (PERFORMANCE_TABLES, other)]
    pages.publish("one", {"rows": []}, sections, record, draw=lambda *_: pytest.fail("drawn"))
    assert "{'rows': []}" in page.read_text()
    assert "rows" not in other.read_text()
    assert (repository / "results" / "avx2" / "one.json").exists()


def test_quick_runs_and_runs_with_a_wait_policy_are_not_recorded(parsed, monkeypatch, capsys):
    assert parsed("--record").record
    with pytest.raises(SystemExit):
        parsed("--quick", "--record")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit):
        parsed("--record")
    capsys.readouterr()
    assert parsed("--quick").quick
    assert "unset it to measure speed" in capsys.readouterr().err
