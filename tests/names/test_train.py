"""The command `train`: what it may replace, and how it survives Ctrl-C and a full disk."""

import errno
import hashlib
import os
import re
from contextlib import contextmanager

import pytest
import torch

from namernn_fast.names import load_checkpoint, pretrained_checkpoint, tensor_files
from namernn_fast.names.commands import train

SMALL = ("--embedding-size", 5, "--hidden-size", 7)
ONCE = ("--epochs", 1, *SMALL)
PROGRAM = "python -m namernn_fast.names"


def test_training_on_the_sample_does_not_replace_a_real_model(
    run, offline, folder, make_data, cache
):
    path = cache / "names.safetensors"
    assert run("train", "--data", folder, *ONCE)[0] == 0
    before = path.read_bytes()
    code, out, err = run("train", *ONCE)
    assert (code, out) == (2, "")
    assert f"{PROGRAM}: error: {path}: a model of real data, which a model of the" in err
    assert path.read_bytes() == before
    assert run("train", *ONCE, "--output", cache / "other")[0] == 0
    assert path.read_bytes() == before
    assert run("train", *ONCE, "--force")[0] == 0
    assert load_checkpoint(path).is_sample()
    # A model trained on the sample may be replaced without --force.
    assert run("train", *ONCE)[0] == 0
    assert run("train", "--data", make_data("more"), *ONCE)[0] == 0
    assert not load_checkpoint(path).is_sample()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model", b""),
        ("model", b"my thesis"),
        ("model.state", b"my thesis"),
    ],
)
def test_a_file_of_another_kind_is_neither_replaced_nor_removed(
    run, fails, folder, tmp_path, name, content
):
    path = tmp_path / name
    path.write_bytes(content)
    options = ("train", "--data", folder, *ONCE, "--checkpoint", tmp_path / "model")
    code, message = fails(*options)
    assert code == 2
    assert message.startswith(f"{path}: ")
    assert message.endswith("; --force replaces it")
    assert path.read_bytes() == content
    assert run(*options, "--force")[0] == 0
    assert run("predict", "Kim", "--checkpoint", tmp_path / "model")[0] == 0


def test_predict_warns_about_a_model_trained_on_the_sample(run, offline, folder, tmp_path):
    warning = "this model was trained on the small embedded sample, not on the names data set\n"
    path = ("--checkpoint", tmp_path / "model")
    run("train", *ONCE, *path)
    code, out, err = run("predict", "Kim", *path)
    assert (code, err.endswith(f"\n{warning}")) == (0, True)
    assert warning not in out
    run("train", "--data", folder, *ONCE, *path)
    assert warning not in run("predict", "Kim", *path)[2]


@pytest.mark.parametrize(
    ("options", "written", "read"),
    [
        (["--data", "names", "--checkpoint", "names/Irish.txt"], "--checkpoint", "--data"),
        (["--data", "~/names.zip", "--checkpoint", "names.zip"], "--checkpoint", "--data"),
        (["--checkpoint", "names/Irish.txt"], "--checkpoint", "NAMERNN_FAST_DATA"),
        (["--teacher", "model", "--checkpoint", "./model"], "--checkpoint", "--teacher"),
        (["--teacher", "model.state", "--checkpoint", "model"], "the state", "--teacher"),
        (["--checkpoint", pretrained_checkpoint()], "--checkpoint", "predict without options"),
    ],
)
def test_training_does_not_overwrite_its_inputs(
    fails, folder, tmp_path, monkeypatch, options, written, read
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAMERNN_FAST_DATA", "names")
    for name in ("names.zip", "model", "model.state"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(train, "load_names", None)  # the data must not be read
    before = contents(tmp_path)
    code, message = fails("train", "--force", *options)
    assert code == 2
    assert re.match(rf"{written}.* would overwrite what {read} reads, ", message)
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt_after(epochs, monkeypatch):
    """Simulates Ctrl-C as soon as `epochs` epochs have been reported."""
    reporter = train._reporter

    def interrupting(recipe):
        reported = []

        def report(epoch):
            reporter(recipe)(epoch)
            reported.append(epoch)
            if len(reported) == epochs:
                raise KeyboardInterrupt

        return report

    monkeypatch.setattr(train, "_reporter", interrupting)


def test_an_interrupted_training_is_resumed(run, fails, folder, make_data, cache, monkeypatch):
    path = cache / "names.safetensors"
    options = ("train", "--data", folder, "--epochs", 2, "--members", 2, *SMALL)
    assert run(*options)[0] == 0
    whole = load_checkpoint(path)
    path.unlink()
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        code, out, err = run(*options)
    assert code == 130
    assert out.splitlines()[-1].startswith("network 2 of 2, epoch 1: ")
    assert err == f"{PROGRAM}: interrupted; --resume continues after the last whole epoch\n"
    assert [each.name for each in cache.iterdir()] == ["names.safetensors.state"]

    more = make_data("more")
    (more / "Polish.txt").write_text("Nowak\nKowalski\nLis\n")
    for option, value, difference in (
        ("--seed", 1, "seed 0, not 1"),
        ("--lr", 0.5, "recipe lr 0.003, not 0.5"),
        ("--split-seed", 1, "split '"),
        ("--data", more, "data '"),
    ):
        code, message = fails(*options, "--resume", option, value)
        assert code == 2
        started = f"{path}.state: the unfinished training was started with {difference}"
        assert message.startswith(started)

    code, out, err = run(*options, "--resume")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()[1:-3]] == ["network 2 of 2, epoch 2"]
    assert [each.name for each in cache.iterdir()] == ["names.safetensors"]
    resumed = load_checkpoint(path)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert fails(*options, "--resume") == (
        2,
        f"{path}.state: there is no unfinished training to resume",
    )


WARNING = (
    "the state of the training could not be written ([Errno 28] No space left on device); "
    "training continues"
)
FULL = f"{PROGRAM}: error: [Errno 28] No space left on device"


@contextmanager
def full(monkeypatch, kind=""):
    """Simulates a disk that becomes full while a file whose name ends in `kind` is written."""
    replacing = tensor_files.replacing

    @contextmanager
    def half(path):
        with replacing(path) as file:
            yield file
            if path.name.endswith(kind):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "replacing", half)
        yield


def test_training_can_be_resumed_after_a_full_disk(run, folder, cache, monkeypatch):
    path = cache / "names.safetensors"
    options = ("train", "--data", folder, "--epochs", 2, *SMALL)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert run(*options)[0] == 130
        replaced = f"{path}.state: replacing an interrupted training; --resume "
        assert run(*options)[2].startswith(replaced)
    before = contents(cache)
    promise = f"{FULL}; when there is space, --resume saves the trained model"
    with full(monkeypatch):
        code, _, err = run(*options, "--resume")
    assert (code, err.splitlines()) == (1, [WARNING, promise])
    assert contents(cache) == before
    with full(monkeypatch, ".safetensors"):
        code, _, err = run(*options, "--resume")
    assert (code, err.splitlines()) == (1, [promise])
    assert not path.exists()
    code, out, err = run(*options, "--resume")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"saved {path}"
    assert [*contents(cache)] == [path]


def test_training_continues_if_its_state_cannot_be_written(run, folder, cache, monkeypatch):
    options = ("train", "--data", folder, "--epochs", 2, *SMALL)
    with full(monkeypatch, ".state"):
        code, _, err = run(*options)
    assert (code, err.splitlines()) == (0, [WARNING] * 2)
    assert [*contents(cache)] == [cache / "names.safetensors"]
    with full(monkeypatch):
        code, _, err = run(*options)
    # The error does not advise --resume, because no state was saved.
    assert (code, err.splitlines()) == (1, [WARNING, WARNING, FULL])


def test_a_teacher_must_match_the_split_and_the_state(run, fails, folder, tmp_path, monkeypatch):
    command = ("train", "--data", folder, *SMALL, "--checkpoint")
    small, *teachers = (tmp_path / name for name in ("small", "teacher 0", "teacher 1"))
    reading = ("--ngrams", "--pooling", "last+mean+max")
    for seed, path in enumerate(teachers):
        assert run(*command, path, "--epochs", 1, "--seed", seed, *reading)[0] == 0
    assert load_checkpoint(teachers[0]).model.config["ngrams"]
    lesson = (*command, small, "--recipe", "distilled", "--epochs", 2, "--made-up", 20, "--teacher")
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert run(*lesson, teachers[0])[0] == 130
    code, message = fails(*lesson, teachers[1], "--resume")
    assert code == 2
    assert "the unfinished training was started with teacher '" in message
    assert run(*lesson, teachers[0], "--resume")[0] == 0
    record = load_checkpoint(small).info["split"]
    assert record["made_up"] == 20
    assert record["teacher"] == hashlib.sha256(teachers[0].read_bytes()).hexdigest()
    for wrong, reason in (
        ((*lesson, teachers[0], "--split-seed", 1), "the teacher was trained on another split"),
        ((*lesson, "pretrained"), "the teacher was trained on another split"),
        ((*command, small, "--recipe", "distilled"), "--recipe distilled needs --teacher"),
        ((*command, small, "--made-up", 9), "--made-up needs --teacher"),
    ):
        code, message = fails(*wrong)
        assert code == 2
        assert reason in message


def test_an_unusable_state_path_fails_before_the_training(fails, folder, tmp_path):
    (tmp_path / "model.state").mkdir()
    options = ("train", "--data", folder, "--checkpoint", tmp_path / "model")
    assert fails(*options) == (2, f"{tmp_path}/model.state: not a plain file")


def test_processes_with_different_data_do_not_train_together(fails, folder, monkeypatch):
    def gather(found, ours):
        found[:] = [ours, "another"]

    monkeypatch.setattr(train, "process", lambda: (0, 2))
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    code, message = fails("train", "--data", folder)
    assert (code, message) == (2, "the processes that train together have read different data")


@pytest.mark.parametrize("size", ["2", "two"])
def test_an_incomplete_torchrun_environment_is_an_error(fails, folder, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    code, message = fails("train", "--data", folder)
    assert code == 2
    assert message.startswith("these are not the variables of torchrun (")
