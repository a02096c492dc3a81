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

    trained = ("--checkpoint", cache / "names.safetensors")
    code, out, _ = run("predict", "Ślusàrski", "Kim", "--top", 2, *trained)
    assert code == 0
    lines = out.splitlines()
    assert lines[0::3] == ["Ślusàrski", "Kim"]
    for best, second in (lines[1:3], lines[4:6]):
        answers = [re.fullmatch(r"  ([01]\.\d{3})  (\w+)", line) for line in (best, second)]
        assert float(answers[0][1]) >= float(answers[1][1]) > 0
        assert {answer[2] for answer in answers} <= set(SAMPLE)

    code, out, _ = run("predict", "Kim", "--top", 99, *trained)
    assert sorted(line.split()[-1] for line in out.splitlines()[1:]) == sorted(SAMPLE)


def test_every_option_of_train_arrives(folder, run, tmp_path):
    path = tmp_path / "model.safetensors"
    options = {
        "--epochs": 1,
        "--batch-size": 50,
        "--lr": 0.01,
        "--schedule": "one-cycle",
        "--weight-decay": 0.02,
        "--label-smoothing": 0.03,
        "--clip": 0.5,
        "--members": 2,
        "--prior-correction": 0.4,
        "--seed": 9,
        "--split": "random",
        "--split-seed": 5,
        "--validation": 0.3,
        "--test": 0.15,
        "--embedding-size": 5,
        "--hidden-size": 7,
        "--layers": 2,
        "--dropout": 0.1,
        "--state-dropout": 0.2,
        "--character-dropout": 0.3,
        "--nonlinearity": "relu",
        "--device": "cpu",
        "--rnn": "torch",
        "--checkpoint": path,
        "--data": folder,
    }
    argv = ("train", "--bidirectional", *(x for pair in options.items() for x in pair))
    code, out, _ = run(*argv)
    assert code == 0
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


def test_the_same_command_prints_the_same(folder, run):
    def printed():
        out = run("train", "--data", folder, "--epochs", 2, *SMALL)[1]
        return re.sub(r"; [\d.]+ s$", "", out, flags=re.MULTILINE)

    assert printed() == printed()


def test_the_sample_is_announced(run, offline, caplog):
    code, out, _ = run("train", "--epochs", 1, *SMALL)
    assert code == 0
    assert " names in 18 languages from the embedded sample; " in out.splitlines()[0]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("nowhere: download failed (Invalid URL")
    assert record.getMessage().endswith(
        "; going on with the small embedded sample, not the data set"
    )


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


def test_weights_that_overflow_are_an_error(run, tmp_path):
    path = tmp_path / "names.safetensors"
    model = NameClassifier(2, 2, 3)
    for value in model.parameters():
        torch.nn.init.constant_(value, 3e38)
    save_checkpoint(path, Checkpoint(model, ("A", "B"), {}))
    code, out, err = run("predict", "Kim", "--checkpoint", path)
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == [
        f"{PROGRAM}: error: the model gives probabilities that are not finite: it is damaged"
    ]


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


def test_an_odd_language_is_refused(fails, make_folder):
    folder = make_folder({"\x1b[31m": "Pugh"})
    assert fails("train", "--data", folder) == (
        2,
        rf"the folder {folder}: '\x1b[31m' cannot be the name of a language",
    )


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["predict", "--help"]])
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


def test_no_network_without_the_sample_is_a_failure(fails, offline):
    code, message = fails("train", "--no-sample")
    assert code == 1
    assert message.startswith("nowhere: download failed (Invalid URL")


def test_bad_data(fails, tmp_path, monkeypatch):
    path = tmp_path / "data"
    missing = f"{path}: there is no such folder or file"
    assert fails("train", "--data", path) == (2, missing)
    assert fails("train", "--data", "") == (2, "the path of the data is empty")
    path.write_bytes(b"PK")
    assert fails("train", "--data", path) == (
        2,
        f"{path}: not a readable zip (File is not a zip file)",
    )
    monkeypatch.setenv("NAMERNN_FAST_DATA", f"{path}\n{path}")
    assert fails("train") == (
        2,
        f"NAMERNN_FAST_DATA: {path} {path}: there is no such folder or file",
    )


def test_dropout_that_would_do_nothing(fails):
    assert fails("train", "--dropout", 0.5) == (
        2,
        "--dropout acts between layers, so it needs --layers 2 or more",
    )


def test_a_path_does_not_steer_the_terminal(fails):
    assert fails("train", "--data", "\x1b[2J\x07") == (
        2,
        r"\x1b[2J\x07: there is no such folder or file",
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epochs", "0", "'0' is not a whole number above 0"),
        ("--batch-size", "1.5", "'1.5' is not a whole number above 0"),
        ("--hidden-size", "99999999999", "'99999999999' is not a whole number above 0"),
        ("--layers", "-1", "'-1' is not a whole number above 0"),
        ("--lr", "nan", "'nan' is not a number above 0"),
        ("--lr", "inf", "'inf' is not a number above 0"),
        ("--clip", "0", "'0' is not a number above 0"),
        ("--dropout", "1", "'1' is not a number from 0 to below 1"),
        ("--validation", "0", "'0' is not a number above 0 and below 1"),
        ("--test", "0", "'0' is not a number above 0 and below 1"),
        ("--test", "1", "'1' is not a number above 0 and below 1"),
        ("--test", "x", "'x' is not a number above 0 and below 1"),
        ("--weight-decay", "-1", "'-1' is not a number from 0"),
        ("--split", "rows", "invalid choice: 'rows'"),
        ("--recipe", "secret", "invalid choice: 'secret'"),
        ("--seed", "-1", "'-1' is not a whole number from 0 to 2**63 - 1"),
        ("--checkpoint", "", "the path is empty"),
        ("--checkpoint", "pretrained", "'pretrained' is the model that comes with the package; "),
        ("--device", "abacus", "abacus cannot be used ("),
        ("--device", "meta", "meta cannot be used ("),
        ("--nonlinearity", "sigmoid", "invalid choice: 'sigmoid'"),
        ("--rnn", "gru", "invalid choice: 'gru'"),
    ],
)
def test_bad_options(option, value, message, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", option, value])
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{PROGRAM} train: error: argument {option}: {message}")


@pytest.mark.parametrize("argv", [[], ["predict"], ["guess", "Kim"]])
def test_bad_commands(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_predict_without_a_usable_checkpoint(fails, tmp_path):
    path = tmp_path / "names.safetensors"
    assert fails("predict", "Kim", "--checkpoint", path) == (2, f"{path}: there is no such file")
    path.write_bytes(b"odd")
    code, message = fails("predict", "Kim", "--checkpoint", path)
    assert code == 2
    assert message.startswith(f"{path}: not a readable safetensors file (")


def test_a_checkpoint_that_cannot_be_written_is_known_before_the_training(fails, folder, tmp_path):
    assert fails("train", "--data", folder, "--checkpoint", tmp_path) == (
        2,
        f"{tmp_path}: not a plain file",
    )
    blocked = folder / "Arabic.txt" / "names.safetensors"
    code, message = fails("train", "--data", folder, "--checkpoint", blocked)
    assert code == 1
    assert str(folder / "Arabic.txt") in message


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


def test_a_missing_package(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    assert fails("train") == (
        1,
        "requests is not installed; run: pip install 'namernn_fast[names]'",
    )


def start(root, *argv, **options):
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_as_a_program(root, folder, tmp_path):
    """Through the interpreter: the warning on standard error, the exit codes, a lost reader."""
    (folder / "Polish.txt").write_text("Nowak\n\nKowalski\n")
    path = tmp_path / "model.safetensors"
    train = start(
        root,
        "-m",
        "namernn_fast.names",
        "train",
        "--data",
        folder,
        "--epochs",
        "1",
        "--checkpoint",
        path,
        *SMALL,
    )
    out, err = train.communicate()
    assert train.returncode == 0
    assert f"\nsaved {path}\n" in out
    assert err == (f"the folder {folder}: skipped 1 empty lines and 0 unusable names\n")
    left = start(root, "-m", "namernn_fast.names", "predict", "Kim", "--checkpoint", path)
    left.stdout.close()
    assert left.wait() == 1
    assert left.stderr.read().count("\n") == 1
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
