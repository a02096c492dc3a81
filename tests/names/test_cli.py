"""The command line: what it prints, and its one line and exit code for everything that fails."""

import re
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from namernn_fast.names import (
    Checkpoint,
    NameClassifier,
    Recipe,
    fit,
    load_checkpoint,
    read_names,
    save_checkpoint,
    split,
)
from namernn_fast.names import __main__ as cli
from namernn_fast.names.commands import train
from namernn_fast.names.sample import SAMPLE

SMALL = ["--embedding-size", "16", "--hidden-size", "32"]
PROGRAM = "python -m namernn_fast.names"


def test_train_then_predict(folder, run, cache):
    code, out, err = run("train", "--data", folder, "--epochs", 2, *SMALL)
    assert (code, err) == (0, "")
    first, *epochs, saved, said, command = out.splitlines()
    parts = split(read_names(folder))
    rows = sum(map(len, SAMPLE.values()))
    assert first == (
        f"{rows} names in 18 languages from the folder {folder}; {len(parts.train)} to train, "
        f"{len(parts.validation)} to validate, {len(parts.test)} to test; "
        f"split {parts.info['sha256'][:16]}"
    )
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert saved == f"saved {cache / 'names.safetensors'}"
    assert said == "predict goes on answering with the pretrained model unless this one is named:"
    assert list(cache.iterdir()) == [cache / "names.safetensors"]

    pretrained = run("predict", "Frank", "--checkpoint", "pretrained")
    assert run("predict", "Frank") == pretrained
    code, out, err = run(*shlex.split(command)[3:])
    assert (code, out == pretrained[1]) == (0, False)
    accuracy = load_checkpoint(cache / "names.safetensors").info["metrics"]["test_accuracy"]
    assert re.fullmatch(
        rf"the model is {cache}/names.safetensors, not the pretrained one: "
        rf"trained on \d{{4}}-\d\d-\d\d, test accuracy {accuracy:.1%}\n",
        err,
    )


def test_every_option_of_train_arrives(folder, run, tmp_path):
    path = tmp_path / "model.safetensors"
    recipe = Recipe(
        epochs=1,
        batch_size=50,
        lr=0.01,
        schedule="one-cycle",
        weight_decay=0.02,
        label_smoothing=0.03,
        clip_norm=0.5,
        members=2,
        prior_correction=0.4,
        model={
            "embedding_size": 5,
            "hidden_size": 7,
            "num_layers": 2,
            "dropout": 0.1,
            "state_dropout": 0.2,
            "character_dropout": 0.3,
            "bidirectional": True,
            "nonlinearity": "relu",
        },
    )
    options = {**recipe.values(), **recipe.model}
    for name in ("model", "calibrated", "bidirectional"):
        del options[name]
    options |= {"clip": options.pop("clip_norm"), "layers": options.pop("num_layers")}
    options |= {"split": "random", "split_seed": 5, "validation": 0.3, "test": 0.15, "seed": 9}
    options |= {"device": "cpu", "rnn": "torch", "data": folder, "checkpoint": path}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code, out, _ = run("train", "--bidirectional", *argv)
    assert code == 0
    parts = split(read_names(folder), method="random", seed=5, validation=0.3, test=0.15)
    saved = load_checkpoint(path)
    assert saved.info["recipe"] == recipe.values()
    assert saved.info["seed"] == 9
    assert saved.info["split"] == parts.info
    expected = fit(parts, recipe, seed=9, rnn_class=torch.nn.RNN)
    for name, value in expected.checkpoint.model.state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], value)
    for epoch in expected.history:
        assert str(epoch).rpartition(";")[0] in out
    assert run("predict", "Kim", "--checkpoint", path, "--rnn", "torch")[0] == 0


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({}, "training date not recorded, test accuracy not recorded"),
        (
            {"trained": "2026-02-03", "metrics": {"validation_accuracy": 0.5}},
            "trained on 2026-02-03, test accuracy not recorded",
        ),
        (
            {"trained": "\x1b[31m", "metrics": {"test_accuracy": 0.1234}},
            "training date not recorded, test accuracy 12.3%",
        ),
        (
            {"trained": 5, "metrics": {"test_accuracy": 7.0}},
            "training date not recorded, test accuracy not recorded",
        ),
        ({"metrics": []}, "training date not recorded, test accuracy not recorded"),
    ],
)
def test_predict_says_what_a_checkpoint_records(run, tmp_path, monkeypatch, info, said):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(NameClassifier(2, 2, 3), ("A", "B"), info)
    save_checkpoint("pretrained", checkpoint)
    code, out, err = run("predict", "Kim", "--checkpoint", "./pretrained", "--top", 1)
    assert (code, err) == (0, f"the model is pretrained, not the pretrained one: {said}\n")
    assert out.splitlines()[1][-1] in "AB"


def test_nothing_steers_the_terminal(run, make_data, offline, tmp_path, capsys):
    """Names, paths, options and languages with control characters, line breaks and directions."""
    odd = "a\x1b[31m\nb\u202e"
    shown = r"a\x1b[31m\nb\u202e"
    folder = make_data(odd)
    (folder / "README.txt").write_text("not a language")
    (folder / "Welsh.txt").write_text("Pugh\n\nPrice\nRees\n")
    path = tmp_path / f"{odd}.safetensors"
    train = ("train", "--data", folder, "--epochs", 1, *SMALL, "--checkpoint", path)
    code, out, err = run(*train)
    assert code == 0
    assert err == (
        f"{tmp_path}/{shown}: README.txt is not taken for a language\n"
        f"the folder {tmp_path}/{shown}: skipped 1 empty lines and 0 unusable names\n"
    )
    assert f"from the folder {tmp_path}/{shown}; " in out.splitlines()[0]
    assert out.splitlines()[-3] == f"saved {tmp_path}/{shown}.safetensors"
    assert all(line.isprintable() for line in out.split("\n"))

    code, out, err = run("predict", odd, "x\u2028y", "--top", 1, "--checkpoint", path)
    assert code == 0
    assert err.startswith(f"the model is {tmp_path}/{shown}.safetensors, not the pretrained one: ")
    assert err.count("\n") == 1
    assert [line for line in out.splitlines() if not line.startswith("  ")] == [shown, r"x\u2028y"]
    assert all(line.isprintable() for line in out.split("\n"))

    for argv in (
        ("predict", "\x1b[\n31", "--checkpoint", str(path)),
        ("predict", "Kim", f"--{odd}"),
        ("predict", "Kim", "--top", odd),
        ("predict", "Kim", "--checkpoint", odd),
        ("predict", "Kim", "--device", odd),
        ("train", "--data", odd),
        ("train", "--recipe", odd),
        ("train", "--seed", odd),
        (odd,),
    ):
        with suppress(SystemExit):  # of argparse
            assert cli.main([*argv]) == 2
        printed = "".join(capsys.readouterr())
        assert all(line.isprintable() for line in printed.split("\n"))
        assert "31" in printed


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help_needs_no_home_folder(argv, homeless, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_without_a_home_folder_paths_must_be_given(homeless, run, fails, folder, tmp_path):
    advice = "there is no folder for what is downloaded and trained: set HOME or XDG_CACHE_HOME"
    path = tmp_path / "names.safetensors"
    options = ("train", "--data", folder, "--epochs", 1, *SMALL)
    assert fails(*options) == (2, advice)
    assert run(*options, "--checkpoint", path)[0] == 0
    assert run("predict", "Kim", "--checkpoint", path)[0] == 0


def test_wrong_input(fails, folder, tmp_path, monkeypatch, offline):
    bad, none = tmp_path / "bad", tmp_path / "none"
    bad.write_bytes(b"PK")
    for argv, code, message in (
        (["train", "--data", none], 2, f"{none}: there is no such folder or file"),
        (["train", "--data", ""], 2, "the path of the data is empty"),
        (["train", "--data", bad], 2, f"{bad}: not a readable zip (File is not a zip file)"),
        (["train", "--no-sample"], 1, "nowhere: download failed (Invalid URL"),
        (["train", "--dropout", 0.5], 2, "--dropout acts between layers, so it needs --layers 2"),
        (["predict", "Kim", "--checkpoint", none], 2, f"{none}: there is no such file"),
        (["predict", "Kim", "--checkpoint", bad], 2, f"{bad}: not a readable safetensors file ("),
        # Known before the training.
        (["train", "--data", folder, "--checkpoint", tmp_path], 2, f"{tmp_path}: not a plain file"),
        (["train", "--data", folder, "--checkpoint", bad / "model"], 1, "[Errno "),
    ):
        found, said = fails(*argv)
        assert (found, said[: len(message)]) == (code, message)
    monkeypatch.setenv("NAMERNN_FAST_DATA", f"{bad}\n{bad}")
    missing = f"NAMERNN_FAST_DATA: {bad} {bad}: there is no such folder or file"
    assert fails("train") == (2, missing)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--epochs", "0"], "--epochs: '0' is not a whole number above 0"),
        (["train", "--batch-size", "1.5"], "--batch-size: '1.5' is not a whole number above 0"),
        (["train", "--layers", "99999999999"], "--layers: '99999999999' is not a whole number"),
        (["train", "--lr", "nan"], "--lr: 'nan' is not a number above 0"),
        (["train", "--lr", "inf"], "--lr: 'inf' is not a number above 0"),
        (["train", "--clip", "0"], "--clip: '0' is not a number above 0"),
        (["train", "--dropout", "1"], "--dropout: '1' is not a number from 0 to below 1"),
        (["train", "--test", "0"], "--test: '0' is not a number above 0 and below 1"),
        (["train", "--test", "1"], "--test: '1' is not a number above 0 and below 1"),
        (["train", "--test", "x"], "--test: 'x' is not a number above 0 and below 1"),
        (["train", "--weight-decay", "-1"], "--weight-decay: '-1' is not a number from 0"),
        (["train", "--seed", "-1"], "--seed: '-1' is not a whole number from 0 to 2**63 - 1"),
        (["train", "--checkpoint", ""], "--checkpoint: the path is empty"),
        (["train", "--checkpoint", "pretrained"], "--checkpoint: 'pretrained' is the model that"),
        (["train", "--device", "abacus"], "--device: abacus cannot be used ("),
        (["train", "--device", "meta"], "--device: meta cannot be used ("),
        (["predict", "Kim", "--input", "names.txt"], "--input: not allowed with argument NAME"),
        (["predict", "Kim", "--delimiter", "ab"], "--delimiter: 'ab' is not one sign, nor 'tab'"),
        (["predict", "Kim", "--delimiter", '"'], "--delimiter: '\"' is not one sign, nor 'tab'"),
        (["predict", "Kim", "--min-probability", "2"], "--min-probability: '2' is not a number"),
        (["serve", "--port", "-1"], "--port: '-1' is not a port from 0 to 65535"),
        (["serve", "--port", "65536"], "--port: '65536' is not a port from 0 to 65535"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{PROGRAM} {argv[0]}: error: argument {message}")


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (RuntimeError("out of\nmemory"), 1, "out of memory"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_while_running(fails, folder, cache, monkeypatch, failure, code, message):
    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(train, "load_names", fail)
    assert fails("train") == (code, message)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train", "requests", "names"),
        ("train", "tqdm", "names"),
        ("serve", "starlette", "serve"),
        ("serve", "uvicorn", "serve"),
    ],
)
def test_a_missing_package(fails, monkeypatch, command, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    advice = f"{package} is not installed; run: pip install 'namernn_fast[{extra}]'"
    assert fails(command) == (1, advice)


def start(root, *argv):
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_reader_that_leaves(root):
    left = start(root, "-m", "namernn_fast.names", "predict", "Kim")
    left.stdout.close()
    assert left.wait() == 1
    assert left.stderr.read() == ""
    left.stderr.close()


def test_the_package_needs_torch_alone(root):
    code = (
        "import sys;"
        "sys.modules.update(dict.fromkeys(('matplotlib', 'requests',"
        "'safetensors', 'scipy', 'sklearn', 'starlette', 'tqdm', 'urllib3', 'uvicorn')));"
        "import namernn_fast.names as names;"
        "from namernn_fast.names.dataset import embedded_sample;"
        "print(len(names.fit(names.split(embedded_sample()), names.Recipe(epochs=1)).history))"
    )
    process = start(root, "-c", code)
    assert process.communicate() == ("1\n", "")
