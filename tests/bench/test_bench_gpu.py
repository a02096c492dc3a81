"""Tests, without a GPU, how the GPU benchmark reports slowdowns, errors and skipped workloads."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import cudnn, grid, race
from benchmarks.gpu import report as page
from benchmarks.gpu.flash import FLASH
from benchmarks.harness.grid import BASELINE, DENSE, FORWARD, FUSED, TRAINING, Workload
from namernn_fast import FusedRNN
from namernn_fast.bench.tables import ratio

ROOT = Path(__file__).parents[2]
# The packages that `pip install torch triton numpy` installs.
BARE = ("torch", "triton", "numpy", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2")
BARE += ("markupsafe", "filelock", "fsspec", "setuptools", "functorch", "torchgen")


@pytest.fixture(autouse=True)
def _precision_of_the_process_stays():
    knobs = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [knob.fp32_precision for knob in knobs]
    yield
    assert [knob.fp32_precision for knob in knobs] == before


@pytest.mark.parametrize(
    ("precision", "of_rnns", "of_products"),
    [(grid.TF32, "tf32", None), (grid.BFLOAT16, "tf32", None), (grid.FLOAT32, "ieee", "ieee")],
)
def test_only_the_float32_benchmark_turns_off_tf32(precision, of_rnns, of_products):
    knobs = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = knobs[1].fp32_precision
    with precision.of_the_process():
        assert [knob.fp32_precision for knob in knobs] == [of_rnns, of_products or before]


def run(platform, deadline=math.inf):
    return list(race.run(platform, deadline))


def report(rows):
    document = {"machine": page.describe(race.DRY), "measurement": False, "rows": rows}
    return page.report(json.loads(json.dumps(document)))


@pytest.fixture
def bare(tmp_path):
    """Returns a checkout that was not built, and an environment with only the `BARE` packages."""
    checkout, packages = tmp_path / "checkout", tmp_path / "packages"
    for folder in ("namernn_fast", "benchmarks", "tools"):
        ignored = shutil.ignore_patterns("*.so", "results", "__pycache__")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignored)
    shutil.copy(ROOT / "Makefile", checkout)
    packages.mkdir()
    for name in BARE:
        found = importlib.util.find_spec(name)
        if found is not None:
            origin = Path(found.origin)
            module = origin.parent if origin.stem == "__init__" else origin
            (packages / module.name).symlink_to(module)
    libraries = Path(importlib.util.find_spec("numpy").origin).parents[1] / "numpy.libs"
    if libraries.exists():
        (packages / "numpy.libs").symlink_to(libraries)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS")}
    return checkout, environment | {"PYTHONPATH": str(packages)}


@pytest.mark.slow
def test_the_dry_run_needs_only_torch_triton_and_numpy(bare):
    checkout, environment = bare
    done = subprocess.run(
        # -S hides the packages that are installed, so only those on PYTHONPATH can be imported.
        ["make", "bench-gpu", "DRY_RUN=1", f"PYTHON={sys.executable} -S"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the plots are left out" in done.stdout
    results = checkout / "build" / "bench"
    assert {path.name for path in results.iterdir()} == {"gpu.json", "gpu.md"}
    rows = json.loads((results / "gpu.json").read_text())["rows"]
    assert [Workload.of(row) for row in rows] == list(grid.DRY_WORKLOADS)
    for row in rows:
        assert row["status"] == race.MEASURED
        assert row["fused_path"].startswith("triton")
        assert all(len(row["seconds"][layer]) == 4 for layer in (BASELINE, FUSED))
    text = (results / "gpu.md").read_text()
    assert "| (4, 5, names) |" in text
    assert "its times mean nothing" in text


@pytest.mark.slow
def test_the_dry_run_fails_if_triton_did_not_run(tmp_path):
    script = (
        "import sys, torch\n"
        "torch.library.Library.impl = lambda *arguments, **options: None\n"
        "from benchmarks.gpu import cudnn\n"
        f"sys.argv = ['gpu', '--dry-run', '--output', {str(tmp_path)!r}]\n"
        "sys.exit(cudnn.main())\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "a training step did not use Triton" in done.stderr


class Wrong(FusedRNN):
    def forward(self, *arguments, **options):
        output, h_n = super().forward(*arguments, **options)
        return output, h_n + 1e-3


class Failing(FusedRNN):
    def forward(self, *arguments, **options):
        raise RuntimeError("out of something")


@pytest.mark.parametrize(
    ("layer", "status", "why"),
    [(Wrong, race.RED, "h_n: error"), (Failing, race.FAILED, "out of something")],
)
def test_a_layer_that_is_wrong_or_fails_is_not_timed(layer, status, why, monkeypatch):
    monkeypatch.setattr(race, "FusedRNN", layer)
    rows = run(race.DRY)
    assert len(rows) == len(grid.DRY_WORKLOADS)
    for row in rows:
        assert row["status"] == status
        assert why in row["why"]
        assert "medians" not in row
    assert cudnn.exit_status(rows) == 1
    text = report(rows)
    assert f"{status}: {len(rows)}\n- {page.title(rows[0])}: {why}" in text
    assert len(re.findall(rf"\| {status} +(?=\|)", text)) == len(rows)


def test_an_error_during_graph_capture_is_recorded():
    def captured(call):
        if FusedRNN in map(type, (call.func, *call.args)):
            return call
        raise RuntimeError("cannot be captured\nmore of it")

    rows = run(replace(race.DRY, launches={race.EAGER: race.eager, race.GRAPH: captured}))
    assert {(row["launch"], row["status"]) for row in rows} == {
        (race.EAGER, race.MEASURED),
        (race.GRAPH, race.FAILED),
    }
    assert rows[1]["why"] == "nn.RNN: cannot be captured\nmore of it"
    assert [*rows[1]["medians"]] == [FUSED]
    text = report(rows)
    assert f"{page.title(rows[1])}: nn.RNN: cannot be captured\n" in text
    assert f" {1e6 * rows[1]['medians'][FUSED]:.1f} |" in text
    assert cudnn.exit_status(rows) == 0


def test_the_table_lists_workloads_skipped_after_the_deadline():
    rows = run(race.DRY, deadline=0)
    assert [Workload.of(row) for row in rows] == list(grid.DRY_WORKLOADS)
    assert {row["status"] for row in rows} == {race.LATE}
    text = report(rows)
    assert len(re.findall(rf"\| {race.LATE} +(?=\|)", text)) == len(rows)
    assert f"{race.LATE}: {len(rows)}\n- {page.title(rows[0])}" in text


def measured(workload, baseline, fused, launch=race.EAGER):
    return race.label(workload, grid.FLOAT32, launch, BASELINE) | {
        "status": race.MEASURED,
        "medians": {BASELINE: baseline, FUSED: fused},
        "fused_path": "triton",
        "nn.RNN_path": "cuDNN",
    }


def test_the_report_lists_slowdowns_and_speedups():
    win, loss = (Workload(DENSE, FORWARD, batch, 8, 16, 4) for batch in (1, 64))
    rows = [measured(win, 8e-6, 1e-6), measured(loss, 1e-6, 2e-6), measured(loss, 9e-6, 1e-6)]
    rows[2]["mode"] = TRAINING
    text = report(rows)
    assert f"{FUSED} under 1.0x: 1\n- {page.title(rows[1])} 0.50\n" in text
    lines = [[*map(str.strip, line.strip("|").split("|"))] for line in text.splitlines()]
    whole = [FORWARD, "all", "all", "2", ratio(2.0), ratio(0.5), page.title(rows[1])]
    assert whole in lines
    assert ["(8, 16, 4)", "1", "float32", "eager", "8.0", "1.0", ratio(8.0), "", "", ""] in lines
    both = ["1.0", "2.0", ratio(0.5), "9.0", "1.0", ratio(9.0)]
    assert ["(8, 16, 4)", "64", "float32", "eager", *both] in lines


def test_each_launch_mode_gets_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    workloads = [Workload(DENSE, FORWARD, batch, 8, 16, 4) for batch in (1, 64)]
    rows = [
        measured(workload, 2e-6, 1e-6, launch)
        for workload in workloads
        for launch in (race.EAGER, race.GRAPH)
    ]
    paths = page.plot(rows, tmp_path)
    assert {path.name for path in paths} == {"gpu_forward_eager.png", "gpu_forward_cuda_graph.png"}
    assert all(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("activation", "status"), [(torch.tanh, race.MEASURED), (torch.sigmoid, race.WRONG_RIVAL)]
)
@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_flashrnn_is_checked_and_timed(monkeypatch, mode, activation, status):
    def elman(Wx, R, b, function, backend, dtype):  # noqa: N803
        """Runs an Elman network on Wx (batch, seq_len, gates, heads, features), like flashrnn."""
        assert (function, backend, dtype) == ("elman", "cuda_fused", "bfloat16")
        h, states = torch.zeros_like(Wx[:, 0, 0]), []
        for x in Wx.unbind(1):
            h = activation(x[:, 0] + torch.einsum("ndp,bnp->bnd", R[0], h) + b[0])
            states.append(h)
        return torch.stack(states, 1)[None], h[None, :, None]

    stub = types.SimpleNamespace(flashrnn=elman)
    monkeypatch.setitem(sys.modules, "flashrnn", stub)
    workload = Workload(DENSE, mode, 3, 4, 5, 6)
    (row,) = race.race_workload(workload, grid.BFLOAT16, race.DRY, FLASH)
    assert row["status"] == status, row
    assert ("medians" in row) == (status == race.MEASURED)
    assert cudnn.exit_status([row]) == 0
