"""Tests that `python -m namernn_fast bench` checks results, times calls and writes files."""

import dataclasses
import io
import json
import math
import re
import statistics
from unittest.mock import Mock

import pytest
import torch
from kinds import map_states

from namernn_fast import __main__ as cli
from namernn_fast.bench import command, timed_calls
from namernn_fast.bench.machine import cpu_name
from namernn_fast.bench.race import QUICK, Rounds
from namernn_fast.bench.tables import ratio
from namernn_fast.bench.workloads import DENSE, FORWARD, GATES, LAYERS_OF, MODES, PACKED, Workload
from namernn_fast.machine import advice

PROGRAM = "python -m namernn_fast: error: "
SIZES = ((DENSE, 1, 4, 5, 6), (DENSE, 3, 4, 5, 6), (PACKED, 3, 4, 5))


@pytest.fixture(params=LAYERS_OF)
def cell(request):
    """The name of a cell, as a value of the option `--cell`."""
    return request.param


@pytest.fixture(autouse=True)
def small_workloads(monkeypatch, tmp_path):
    """Replaces the workloads of `bench` with tiny ones, and changes to an empty directory."""
    workloads = tuple(Workload(family, mode, *sizes) for family, *sizes in SIZES for mode in MODES)
    monkeypatch.setattr(command, "WORKLOADS", workloads)
    monkeypatch.setattr(command, "PACKED_SHAPE", (4, 5))
    monkeypatch.chdir(tmp_path)
    return workloads


@pytest.fixture
def raced(monkeypatch):
    """Replaces timing with fixed times, and records the thread count and inference mode."""
    seen = []

    def race(calls, budget):
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        baseline, fused = calls
        return {baseline: Rounds(1, (0.4, 0.6, 0.5)), fused: Rounds(1, (0.15, 0.3, 0.2))}

    monkeypatch.setattr(command, "race", race)
    return seen


@pytest.mark.covering(0)
@pytest.mark.parametrize("agree", [True, False])
def test_every_workload_is_checked_timed_and_printed(
    cell, agree, small_workloads, tmp_path, monkeypatch, capsys
):
    """Speed-ups compare median times, or the best times if the rounds differ too much."""
    monkeypatch.setattr(command, "DISAGREEMENT", math.inf if agree else 0.5)
    assert cli.main(["bench", "--cell", cell, "--quick", "--json", "rounds.json"]) == 0
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.json"]
    document = json.loads((tmp_path / "rounds.json").read_text())
    assert out.startswith(document["machine"] + "\n")
    baseline, fused = LAYERS_OF[cell]
    assert f"; {fused} on `" in document["machine"]
    assert f"| forward: {baseline} | {fused} |" in " ".join(out.split())
    assert f"within the error budget in all {len(small_workloads)} workloads" in out

    times = {}
    for row in document["rows"]:
        assert len(row["seconds"]) >= QUICK.min_rounds
        assert min(row["seconds"]) > 0
        chosen = statistics.median if agree else min
        times.setdefault(Workload.of(row), {})[row["layer"]] = chosen(row["seconds"])
    assert tuple(times) == tuple(
        dataclasses.replace(workload, cell=cell) for workload in small_workloads
    )
    speed_ups = [timed[baseline] / timed[fused] for timed in times.values()]
    for summary in (statistics.geometric_mean, min):
        for place in range(len(MODES)):
            speed_ups.append(summary(speed_ups[place : len(small_workloads) : len(MODES)]))
    # Ratios are found line by line. On each line, the forward pass comes before training.
    printed = re.findall(r"\d+\.\d\d×(?: ▼)?", out)
    assert printed == [ratio(value) for value in speed_ups]
    assert out.index("do not rely on these times.") < out.index("geometric mean")
    assert ("these are the best rounds" in out) != agree
    assert ("\nMedians of" in out) == agree


def test_rounds_disagree_if_the_median_is_far_above_the_minimum():
    workload = command.WORKLOADS[0]

    def disagree(*seconds):
        return command.disagree({workload: {"a": Rounds(1, (1.0, 1.1)), "b": Rounds(1, seconds)}})

    assert not disagree(1.0, 1.4, 9.0)
    assert disagree(1.0, 1.6, 1.6)


def test_timing_uses_the_requested_threads(raced, small_workloads, threads, capsys, tmp_path):
    threads(1)
    assert cli.main(["bench", "--threads", "2"]) == 0
    assert raced == [(2, workload.mode == FORWARD) for workload in small_workloads]
    assert torch.get_num_threads() == 1
    assert capsys.readouterr().out.count("2.50×") == len(small_workloads) + 4
    assert not list(tmp_path.iterdir())


@pytest.mark.covering(0)
def test_nothing_is_timed_if_a_result_is_wrong(cell, raced, monkeypatch, capsys):
    baseline, fused = timed_calls.CLASSES[cell]

    class Wrong(fused):
        def forward(self, *arguments, **options):
            output, states = super().forward(*arguments, **options)
            return output, map_states(states, lambda state: state + 1e-3)

    monkeypatch.setitem(timed_calls.CLASSES, cell, (baseline, Wrong))
    assert cli.main(["bench", "--cell", cell]) == 1
    printed = capsys.readouterr()
    workload = dataclasses.replace(command.WORKLOADS[0], cell=cell)
    wrong = f"{PROGRAM}{fused.__name__} is wrong in {workload} (D input features, H "
    assert printed.err.startswith(wrong)
    assert "T time steps, B sequences in a batch), nothing was timed: h_n" in printed.err
    assert printed.err.count("\n") == 1
    assert "|" not in printed.out
    assert not raced


@pytest.mark.slow
def test_plot_is_written_to_the_requested_file(raced, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--plot", "speed.png"]) == 0
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_fails_before_timing(raced, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", "speed.png"]) == 1
    assert capsys.readouterr() == (
        "",
        f"{PROGRAM}--plot needs matplotlib, which is not installed: pip install matplotlib\n",
    )
    assert not raced


@pytest.mark.parametrize(
    "options",
    [
        "--threads 0",
        "--threads two",
        "--seconds 0",
        "--seconds nan",
        "--seconds 1 --quick",
        "--cell vanilla",
        "--json missing/rounds.json",
        "--json .",
        "--plot speed.gif.txt.exe",
        "speed",
    ],
)
def test_invalid_bench_options_fail_before_timing(options, raced, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *options.split()])
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert not raced


@pytest.mark.slow
def test_a_busy_machine_is_reported(raced, monkeypatch, capsys):
    loads = iter([10.0 * advice.gather().processors, 0.0])
    monkeypatch.setattr(advice, "_load", lambda: next(loads))
    assert cli.main(["bench"]) == 0
    assert "busy with other programs: do not rely on these times" in capsys.readouterr().out
    assert cli.main(["bench"]) == 0
    assert "busy" not in capsys.readouterr().out


def test_interruption_restores_the_number_of_threads(monkeypatch, threads, capsys):
    threads(1)
    monkeypatch.setattr(command, "race", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["bench", "--threads", "2", "--json", "rounds.json"]) == 130
    assert torch.get_num_threads() == 1
    assert capsys.readouterr().err == "python -m namernn_fast: interrupted\n"


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 1, "A CPU (Zen 3)"),
        ("AuthenticAMD", 25, 0x11, "A CPU (Zen 4)"),
        ("AuthenticAMD", 25, 0xA0, "A CPU (Zen 4)"),
        ("AuthenticAMD", 26, 2, "A CPU (Zen 5)"),
        ("AuthenticAMD", 99, 1, "A CPU"),
        ("GenuineIntel", 6, 143, "A CPU (Sapphire Rapids)"),
        ("GenuineIntel", 6, 85, "A CPU"),
    ],
)
def test_processor_names_include_the_generation(vendor, family, model, name, monkeypatch):
    text = f"processor: 0\nvendor_id\t: {vendor}\ncpu family : {family}\nmodel : {model}\n"
    text += "model name\t: A CPU\n\nprocessor: 1\nmodel name : another\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
    assert cpu_name() == name


@pytest.mark.parametrize(
    ("flags", "capability", "name"),
    [
        ("avx2 avx512f", "AVX2", "A CPU, held to AVX2"),
        ("avx2 avx512f", "AVX512", "A CPU"),
        ("avx2", "AVX2", "A CPU"),
    ],
)
def test_processor_names_say_whether_avx512_is_switched_off(flags, capability, name, monkeypatch):
    text = f"model name\t: A CPU\nflags\t\t: fpu {flags}\n"
    monkeypatch.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_name() == name


def test_a_cell_of_a_user_races_a_loop_over_its_function(raced, capsys):
    name = "equation_cells:rnn_equation"
    try:
        assert cli.main(["bench", "--cell", name, "--quick"]) == 0
    finally:
        for names in (LAYERS_OF, GATES, timed_calls.CLASSES):
            del names[name]
    output = capsys.readouterr().out
    assert "Results of rnn_equation layer are within the error budget in all 4" in output
    assert "forward: loop over rnn_equation" in output
    assert "packed" not in output


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("sru", "is neither one of rnn, gru, lstm, nor MODULE:NAME of a cell"),
        ("equation_cells:missing", "has no attribute 'missing'"),
        ("equation_cells:TWINS", "is not a cell made by recurrent_cell"),
    ],
)
def test_what_is_no_cell_is_rejected(cell, text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--cell", cell, "--quick"])
    assert text in capsys.readouterr().err
