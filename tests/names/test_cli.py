"""Tests the command line: its output, and the one-line error and exit code of each failure."""

import shlex
import subprocess
import sys
from contextlib import suppress
from itertools import product
from unittest import mock

import pytest
import torch

import namernn_fast
from namernn_fast import names
from namernn_fast.names import Recipe, recipes
from namernn_fast.names import __main__ as cli
from namernn_fast.names.commands import train

SMALL = ["--embedding-size", "16", "--hidden-size", "32"]
PROGRAM = "python -m namernn_fast.names"


def test_predict_uses_a_trained_model_only_if_it_is_requested(folder, run, cache):
    out, err = run("train", "--data", folder, "--epochs", 2, *SMALL)
    assert err == ""
    first, *epochs, saved, said, command = out.splitlines()
    parts = names.split(names.read_names(folder))
    assert f"from the folder {folder}; {parts.info['names']['train']} to train, " in first
    assert first.endswith(f"; split {parts.info['sha256'][:16]}")
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    path = cache / "names.safetensors"
    assert saved == f"saved {path}"
    assert said.startswith("predict uses the pretrained model unless")
    assert list(cache.iterdir()) == [path]

    pretrained = run("predict", "Frank", "--checkpoint", "pretrained")
    assert run("predict", "Frank") == pretrained
    out, err = run(*shlex.split(command)[3:])
    assert out != pretrained[0]
    accuracy = names.load_checkpoint(path).info["metrics"]["test_accuracy"]
    assert err.startswith(f"the model is {path}, not the pretrained one: trained on 20")
    assert err.endswith(f", test accuracy {accuracy:.1%}\n")


def test_every_train_option_takes_effect(folder, run, tmp_path):
    path = tmp_path / "model.safetensors"
    shape = {"embedding_size": 5, "hidden_size": 7, "num_layers": 2, "nonlinearity": "relu"}
    shape |= {"dropout": 0.1, "state_dropout": 0.2, "character_dropout": 0.3}
    steps = {"epochs": 1, "batch_size": 50, "lr": 0.01, "schedule": "one-cycle", "clip_norm": 0.5}
    steps |= {"weight_decay": 0.02, "label_smoothing": 0.03, "members": 2, "prior_correction": 0.4}
    recipe = Recipe(**steps, model={**shape, "bidirectional": True})
    options = {**steps, **shape}
    options |= {"clip": options.pop("clip_norm"), "layers": options.pop("num_layers")}
    options |= {"split": "random", "split_seed": 5, "validation": 0.3, "test": 0.15, "seed": 9}
    options |= {"device": "cpu", "rnn": "torch", "data": folder, "checkpoint": path}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    out, _ = run("train", "--bidirectional", *argv)
    data = names.read_names(folder)
    parts = names.split(data, method="random", seed=5, validation=0.3, test=0.15)
    saved = names.load_checkpoint(path)
    assert saved.info["recipe"] == recipe.values()
    assert saved.info["seed"] == 9
    assert saved.info["split"] == parts.info
    expected = names.fit(parts, recipe, seed=9, rnn_class=torch.nn.RNN)
    wanted = expected.checkpoint.model.state_dict()
    torch.testing.assert_close(saved.model.state_dict(), wanted, rtol=0, atol=0)
    assert all(str(epoch).rpartition(";")[0] in out for epoch in expected.history)
    run("predict", "Kim", "--checkpoint", path, "--rnn", "torch")


NO_DATE, NO_ACCURACY = "training date not recorded", "test accuracy not recorded"


@pytest.mark.parametrize(
    ("info", "date", "accuracy"),
    [
        ({"metrics": {"test_accuracy": 7.0}}, NO_DATE, NO_ACCURACY),
        ({"trained": "\x1b" * 99}, "trained on " + r"\x1b" * 10, NO_ACCURACY),
        ({"metrics": {"test_accuracy": 0.1234}}, NO_DATE, "test accuracy 12.3%"),
    ],
)
def test_predict_reports_the_date_and_accuracy_of_a_checkpoint(
    run, tmp_path, monkeypatch, info, date, accuracy
):
    monkeypatch.chdir(tmp_path)
    model = names.NameClassifier(2, 2, 3)
    names.save_checkpoint("pretrained", names.Checkpoint(model, ("A", "B"), info))
    out, err = run("predict", "Kim", "--checkpoint", "./pretrained", "--top", 1)
    assert err == f"the model is pretrained, not the pretrained one: {date}, {accuracy}\n"
    assert out.splitlines()[1][-1] in "AB"
    assert run("predict", "Kim", "--checkpoint", "pretrained")[1] == ""


def test_output_cannot_control_the_terminal(run, make_data, offline, tmp_path, capsys):
    """Control characters, line breaks and text-direction marks are escaped everywhere."""
    odd = "a\x1b[31m\nb\u202e"
    shown = r"a\x1b[31m\nb\u202e"
    folder = make_data(odd)
    (folder / "README.txt").write_text("not a language")
    (folder / "Welsh.txt").write_text("Pugh\n\nPrice\nRees\n")
    path = tmp_path / f"{odd}.safetensors"
    trained = run("train", "--data", folder, "--epochs", 1, *SMALL, "--checkpoint", path)
    asked = run("predict", odd, "x\u2028y", "--top", 1, "--checkpoint", path)
    assert trained[1] == (
        f"{tmp_path}/{shown}: README.txt is not taken for a language\n"
        f"the folder {tmp_path}/{shown}: skipped 1 empty lines and 0 unusable names\n"
    )
    assert f"the model is {tmp_path}/{shown}.safetensors, not the pretrained one: " in asked[1]
    assert [line for line in asked[0].splitlines() if line[0] != " "] == [shown, r"x\u2028y"]
    assert all(line.isprintable() for line in "".join(trained + asked).split("\n"))

    for argv in (
        ("predict", "\x1b[\n31", "--checkpoint", str(path)),
        ("predict", "Kim", f"--{odd}"),
        ("predict", "Kim", "--top", odd),
        ("predict", "Kim", "--checkpoint", odd),
        ("predict", "Kim", "--device", odd),
        ("train", "--data", odd),
        ("train", "--recipe", odd),
        (odd,),
    ):
        with suppress(SystemExit):  # argparse exits if an option is invalid
            assert cli.main([*argv]) == 2
        printed = "".join(capsys.readouterr())
        assert all(line.isprintable() for line in printed.split("\n"))
        assert "31" in printed


def test_without_a_home_folder_commands_require_paths(homeless, run, fails, folder, tmp_path):
    advice = "there is no folder for downloads and trained models: set HOME or XDG_CACHE_HOME"
    path = tmp_path / "names.safetensors"
    options = ("train", "--data", folder, "--epochs", 1, *SMALL)
    assert fails(*options) == advice
    run(*options, "--checkpoint", path)
    run("predict", "Kim", "--checkpoint", path)
    with pytest.raises(SystemExit, match="0"):
        run("train", "--help")


def test_invalid_input_is_reported_in_one_line(fails, folder, tmp_path, offline):
    bad, none, path = (tmp_path / name for name in ("bad", "none", "path"))
    bad.write_bytes(b"PK")
    path.mkdir()
    save_to = ["train", "--data", folder, "--checkpoint"]
    for argv, code, message in (
        (["train", "--data", none], 2, f"{none}: there is no such folder or file"),
        (["train", "--no-sample"], 1, "nowhere: download failed (Invalid URL"),
        (["data", "--no-sample"], 1, "nowhere: download failed (Invalid URL"),
        (["train", "--dropout=0.5"], 2, "--dropout applies between layers, so it needs --layers 2"),
        (["predict", "Kim", "--checkpoint", bad], 2, f"{bad}: not a readable safetensors file ("),
        # An unusable --checkpoint path is reported before training starts.
        ([*save_to, tmp_path], 2, f"{tmp_path}: not a regular file"),
        ([*save_to, bad / "model"], 1, "[Errno "),
        ([*save_to, path], 2, f"{path}: not a regular file"),
    ):
        assert fails(*argv, code=code).startswith(message)


@pytest.mark.parametrize(
    ("command", "options", "values", "said"),
    [
        (
            "train",
            ["--epochs", "--batch-size", "--layers"],
            ["0", "1.5", "99999999999"],
            "is not a whole number above 0",
        ),
        ("train", ["--lr", "--clip"], ["0", "nan", "inf"], "is not a number above 0"),
        ("train", ["--dropout"], ["-1", "1"], "is not a number from 0 to below 1"),
        ("train", ["--test"], ["0", "1", "x"], "is not a number above 0 and below 1"),
        ("train", ["--weight-decay"], ["-1"], "is not a number from 0"),
        ("train", ["--seed"], ["-1"], "is not a whole number from 0 to 2**63 - 1"),
        ("train", ["--checkpoint"], [""], "the path is empty"),
        ("train", ["--checkpoint"], ["pretrained"], "is the model that"),
        ("train", ["--device"], ["abacus", "meta"], "cannot be used ("),
        ("predict Kim", ["--input"], ["names.txt"], "not allowed with argument NAME"),
        ("predict Kim", ["--delimiter"], ["ab", '"'], "is not a single character or 'tab'"),
        ("predict Kim", ["--min-probability"], ["2"], "is not a number from 0 to 1"),
    ],
)
def test_invalid_option_values_are_rejected(command, options, values, said, capsys):
    for option, value in product(options, values):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command.split(), option, value])
        (line,) = capsys.readouterr().err.splitlines()
        names = {"train --checkpoint": "--checkpoint/--output"}.get(f"{command} {option}", option)
        assert line.startswith(f"{PROGRAM} {command.split()[0]}: error: argument {names}: ")
        assert said in line


@pytest.mark.parametrize("argv", [["predct", "Kim"], ["train", "--epoch-s", "3"], []])
def test_a_typo_is_reported_in_one_line(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(PROGRAM)
    assert line.endswith(" (--help lists the options)")


def test_version_prints_the_package_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"namernn_fast {namernn_fast.__version__}\n"


# Options without a default. They have no effect unless they are given.
WITHOUT_DEFAULT = {
    *("--figures", "--force", "--help", "--input", "--json"),
    *("--no-header", "--no-ngrams", "--no-sample", "--report", "--teacher"),
}


@pytest.mark.parametrize("command", ["data", "train", "evaluate", "predict"])
def test_help_shows_every_default(command):
    (commands,) = cli._parser()._subparsers._group_actions
    parser = commands.choices[command]
    for action in parser._actions:
        option = (action.option_strings or [""])[-1]
        shown = parser._get_formatter()._expand_help(action)
        has_default = option and option not in WITHOUT_DEFAULT
        assert ("(default: " in shown or "(without it: " in shown) == bool(has_default), option


def test_help_explains_every_recipe():
    assert recipes.DESCRIPTIONS.keys() == names.RECIPES.keys()
    (commands,) = cli._parser()._subparsers._group_actions
    shown = " ".join(commands.choices["train"].format_help().split())
    for name, text in recipes.DESCRIPTIONS.items():
        assert f"{name}: {text}" in shown
    assert "networks whose logits are averaged (default: 1; reference: 8)" in shown
    assert "with one-cycle, its maximum (default: 0.003)" in shown


@pytest.mark.slow
def test_predict_does_not_warn_about_a_missing_numpy(root):
    code = "import sys; sys.modules['numpy'] = None; import namernn_fast.names.__main__ as cli;"
    argv = [sys.executable, "-c", f"{code} sys.exit(cli.main(['predict', 'Kim']))"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (RuntimeError("out of\nmemory"), 1, "error: out of memory"),
        (MemoryError(), 1, "error: MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_are_reported_in_one_line(run, cache, monkeypatch, failure, code, message):
    monkeypatch.setattr(train.options, "load_data", mock.Mock(side_effect=failure))
    assert run("train", code=code) == ("", f"{PROGRAM}: {message}\n")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train", "requests", "names"),
        ("train", "tqdm", "names"),
        ("evaluate", "sklearn", "evaluate"),
        ("evaluate --figures pictures", "matplotlib", "evaluate"),
    ],
)
def test_an_error_names_the_extra_to_install(fails, monkeypatch, command, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    advice = f"{package} is not installed; run: pip install 'namernn_fast[{extra}]'"
    assert fails(*command.split(), code=1) == advice


def test_a_closed_pipe_is_not_reported_as_an_error(root):
    argv = [sys.executable, "-m", "namernn_fast.names", "predict", "Kim"]
    left = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    left.stdout.close()
    assert (left.stderr.read(), left.wait()) == (b"", 1)
    left.stderr.close()


@pytest.mark.slow
def test_training_needs_only_torch(root):
    code = (
        "import sys;"
        "sys.modules.update(dict.fromkeys(('matplotlib', 'requests',"
        "'safetensors', 'scipy', 'sklearn', 'tqdm', 'urllib3')));"
        "import namernn_fast.names as names;"
        "from namernn_fast.names.dataset import embedded_sample;"
        "print(len(names.fit(names.split(embedded_sample()), names.Recipe(epochs=1)).history))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
