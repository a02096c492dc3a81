"""Tests that every example runs, prints what it claims, and fails if its claim is false.

The test of an example is skipped if a package that the example needs is not installed.
"""

import asyncio
import re
import runpy
import site
import sys
import threading
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from torch.utils._pytree import tree_map_only

from namernn_fast import FusedLeakyRNN, FusedLSTM, FusedRNN, names

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "swap_in": (),
    "lengths": (),
    "resets": ("gymnasium",),
    "recurrent_ppo": ("sb3_contrib",),
    "torchrl_modules": ("torchrl",),
    "decisions": ("neurogym",),
    "onnx_export": ("onnxscript", "onnxruntime"),
    "ensemble": (),
    "privacy": ("opacus",),
    "serve_names": ("starlette", "uvicorn"),
    "score_table": ("ray.data", "safetensors"),
    "train_torchrun": (),
}
"""The packages that an example needs besides torch."""


@pytest.fixture
def run(threads, monkeypatch, tmp_path, capsys):
    """Provides a function that runs an example in this process and returns the printed output."""
    threads(1)  # models this small gain nothing from more threads
    monkeypatch.chdir(tmp_path)

    def run(name):
        for package in NEEDS[name]:
            pytest.importorskip(package)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def numbers(pattern, printed):
    """Returns the numbers that a pattern's groups match. The pattern must match exactly once."""
    (found,) = re.findall(pattern, printed)
    return [float(number.replace(",", "")) for number in ([found] if type(found) is str else found)]


def test_every_example_is_tested_and_listed_in_the_readme():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts - {"walkthrough", "build_walkthrough"} == set(NEEDS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[(\w+)\.py\]\(\.\./examples/\1\.py\)", readme)) == scripts


@pytest.mark.parametrize("name", [name for name, needed in NEEDS.items() if needed])
def test_an_example_with_a_missing_package_says_what_to_install(name, monkeypatch):
    package = NEEDS[name][0].partition(".")[0]
    for module in (package, *NEEDS[name], "onnxruntime", "pyarrow", "gymnasium"):
        monkeypatch.setitem(sys.modules, module, None)
    advice = r"^[\w.]+ is not installed; run: pip install ('namernn_fast\[|neurogym$)"
    with pytest.raises(SystemExit, match=advice):
        runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_swap_in_example_matches_torch(run):
    printed = run("swap_in")
    assert "the layer was RNN and is FusedRNN\n" in printed
    # The 19 tensors are 4 for each of 2 directions in 2 layers, 1 embedding, and 2 for the head.
    assert numbers(r"checkpoints: (\d+) tensors of equal names load both ways", printed) == [19]


def test_the_lengths_example_matches_packing_and_learns(run):
    accuracy, chance = numbers(r"after training: (\S+), by chance (\S+)", run("lengths"))
    assert accuracy > 0.9 > chance


def test_the_resets_example_matches_a_loop_and_learns(run):
    printed = run("resets")
    begun, environments, steps = numbers(
        r"(\d+) episodes begin in (\d+) environments within (\d+) steps", printed
    )
    assert environments < begun < environments * steps
    (first,), (last,) = (numbers(rf"earns (\S+) at {when}", printed) for when in ("first", "last"))
    assert first < 0.5
    assert last > 0.9


@pytest.mark.filterwarnings("ignore:.*render_modes:UserWarning")
def test_the_decisions_example_matches_a_loop_and_learns(run):
    printed = run("decisions")
    before, after = (
        numbers(rf"right choices {when} training: (\d+)%", printed)[0]
        for when in ("before", "after")
    )
    assert before < 60
    assert after > 75


def test_the_recurrent_ppo_example_matches_a_loop(run):
    update = r"update +\d+: loss +(\S+), loop +(\S+); reward +(\S+), loop +(\S+)"
    updates = re.findall(update, run("recurrent_ppo"))
    assert len(updates) == 4
    loss, of_loop, reward, reward_of_loop = map(float, updates[0])
    assert reward == reward_of_loop
    assert loss == pytest.approx(of_loop, rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # torchrl's own
def test_the_torchrl_example_matches_its_modules(run):
    found = re.findall(r"Fused(\w+): .* within the error budget of (\w+); ", run("torchrl_modules"))
    assert found == [("GRUModule", "GRUModule"), ("LSTMModule", "LSTMModule")]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
def test_the_exported_onnx_model_matches_the_layer_for_other_sizes(run):
    printed = run("onnx_export")
    nodes, layers = numbers(r"(\d+) nodes, (\d+) of them RNN", printed)
    assert nodes > layers == 1
    for shape in ((1, 1), (3, 7), (16, 40), (100, 12)):
        batch = "batch {}, steps {}: equal, largest distance".format(*shape)
        assert numbers(rf"{batch} (\S+)", printed)[0] < 1e-5


def test_the_ensemble_predicts_better_than_its_members(run):
    printed = run("ensemble")
    (alone,), (together,) = (
        numbers(rf"error of {what}: (\S+)", printed)
        for what in ("a member, on average", "the mean prediction")
    )
    noise = 0.1**2
    assert noise < together < alone < 0.1


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Full backward hook is firing")
def test_the_privacy_example_matches_a_loop_and_learns(run):
    printed = run("privacy")
    assert numbers(r"accuracy on other samples: (\S+)", printed)[0] > 0.8
    epsilon, delta = numbers(r"privacy spent: epsilon (\S+) at delta (\S+)", printed)
    assert 0.5 < epsilon < 4
    assert delta < 1 / 2048


def test_the_score_table_example_matches_a_single_call(run_program, tmp_path):
    for package in NEEDS["score_table"]:
        pytest.importorskip(package)
    # Ray writes to HOME, so change HOME. Let Python still find packages in the user's home.
    folders = {"HOME": str(tmp_path), "PYTHONUSERBASE": site.getuserbase()}
    program = (EXAMPLES / "score_table.py", "--rows", "20000")
    printed = run_program(*program, cwd=tmp_path, **folders)
    assert "20,000 rows of 8 files: the languages match a single call\n" in printed
    assert numbers(r"(\d+) workers took part", printed)[0] in (1, 2)
    counts = dict(re.findall(r"(\w+) ([\d,]+)(?:, |\n)", printed.partition("most frequent: ")[2]))
    assert len(counts) == 4
    assert "English" in counts


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)
def test_the_train_torchrun_example_matches_a_single_process(run_program, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    printed = run_program(*torchrun, EXAMPLES / "train_torchrun.py", cwd=tmp_path)
    losses = re.findall(r"update +\d+: loss (\S+) by 2 processes, (\S+) by one\n", printed)
    assert len(losses) == 5
    for together, alone in losses:
        assert float(together) == pytest.approx(float(alone), rel=1e-2, abs=2e-4)
    last, difference = numbers(r"last loss (\S+); largest difference of all losses (\S+)", printed)
    assert last < 0.1 < float(losses[0][0])
    assert difference < 1e-3


def slightly_wrong(function):
    """Wraps a function, and any function that it returns, to multiply results by 1.001."""

    def wrong(*arguments, **options):
        result = function(*arguments, **options)
        if callable(result):
            return slightly_wrong(result)
        return tree_map_only(torch.Tensor, lambda tensor: 1.001 * tensor, result)

    return wrong


@pytest.mark.parametrize(
    ("name", "place", "attribute"),
    [
        ("swap_in", FusedRNN, "forward"),
        ("lengths", FusedRNN, "last_state"),
        ("resets", FusedRNN, "forward"),
        ("recurrent_ppo", FusedLSTM, "forward"),
        ("decisions", FusedLeakyRNN, "forward"),
        ("ensemble", torch.func, "vmap"),
        ("privacy", torch.func, "vmap"),
    ],
)
def test_examples_fail_if_results_are_slightly_wrong(name, place, attribute, run, monkeypatch):
    monkeypatch.setattr(place, attribute, slightly_wrong(getattr(place, attribute)))
    with pytest.raises(AssertionError, match=r"exceeds its budget|Tensor-likes are not close"):
        run(name)


def test_requests_that_arrive_while_the_model_runs_share_a_call():
    example = runpy.run_path(str(EXAMPLES / "serve_names.py"))
    calls, goes_on = [], threading.Event()

    def double(items):
        calls.append(items)
        goes_on.wait(60)
        if "bad" in items:
            raise ValueError("a bad item")
        return [2 * item for item in items]

    async def ask():
        predict = example["Batcher"](double)
        first = asyncio.create_task(predict(["a"]))
        while not calls:
            await asyncio.sleep(0)
        others = [asyncio.create_task(predict(items)) for items in (["b", "c"], [], ["d"])]
        await asyncio.sleep(0)
        others[2].cancel()
        goes_on.set()
        found = await asyncio.gather(first, *others[:2], predict(["e"]))
        with pytest.raises(ValueError, match="a bad item"):
            await predict(["bad"])
        return [*found, await predict(["f"])]

    assert asyncio.run(ask()) == [["aa"], ["bb", "cc"], [], ["ee"], ["ff"]]
    assert calls[:2] == [["a"], ["b", "c", "d", "e"]]


def test_the_service_answers_with_languages_or_says_which_name_is_wrong():
    example = runpy.run_path(str(EXAMPLES / "serve_names.py"))
    predictor = names.load()
    with TestClient(example["application"](predictor)) as asking:
        answer = asking.get("/?name=Nguyen&name=Rossi")
        wrong = asking.get("/?name=Nguyen&name=李")
        nothing = asking.get("/")
    for name in ("Nguyen", "Rossi"):
        expected = predictor.predict([name])[0]
        assert [language for language, _ in answer.json()[name]] == [pair[0] for pair in expected]
    assert (wrong.status_code, [*wrong.json()["error"]]) == (400, ["李"])
    assert (nothing.status_code, nothing.json()) == (
        400,
        {"error": "give 1 to 1000 names: /?name=Nguyen"},
    )
