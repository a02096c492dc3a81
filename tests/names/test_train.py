"""Tests `names train` with existing files, Ctrl-C, a full disk and several processes."""

import errno
import hashlib
import os
import re
from contextlib import contextmanager

import pytest
import torch

from namernn_fast.names import (
    load_checkpoint,
    pretrained_checkpoint,
    read_names,
    split,
    tensor_files,
)
from namernn_fast.names.commands import train

SMALL = ("--embedding-size", 5, "--hidden-size", 7)
ONCE = ("--epochs", 1, *SMALL)
PROGRAM = "python -m namernn_fast.names"
SAMPLE = "\nthis model was trained on the small embedded sample, not on the names data set\n"


def test_training_on_the_sample_does_not_replace_a_real_model(
    run, offline, folder, make_data, cache
):
    path = cache / "names.safetensors"
    run("train", "--data", folder, *ONCE)
    before = path.read_bytes()
    out, err = run("train", *ONCE, code=2)
    assert out == ""
    assert f"{PROGRAM}: error: {path}: this model was trained on real data, and" in err
    assert path.read_bytes() == before
    run("train", *ONCE, "--output", cache / "other")
    assert path.read_bytes() == before
    run("train", *ONCE, "--force")
    assert load_checkpoint(path).is_sample()
    out, err = run("predict", "Kim", "--checkpoint", path)
    assert SAMPLE in err
    assert SAMPLE not in out
    # A model trained on the sample may be replaced without --force.
    run("train", *ONCE)
    run("train", "--data", make_data("more"), *ONCE)
    assert not load_checkpoint(path).is_sample()
    assert SAMPLE not in run("predict", "Kim", "--checkpoint", path)[1]


@pytest.mark.parametrize("content", [b"", b"my thesis"])
def test_a_file_of_another_kind_is_neither_replaced_nor_removed(
    run, fails, folder, tmp_path, content
):
    path = tmp_path / "model"
    path.write_bytes(content)
    options = ("train", "--data", folder, *ONCE, "--checkpoint", tmp_path / "model")
    message = fails(*options)
    assert message.startswith(f"{path}: ")
    assert message.endswith("; --force overwrites the file")
    assert path.read_bytes() == content
    run(*options, "--force")
    run("predict", "Kim", "--checkpoint", tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "written", "read"),
    [
        (["--data", "names", "--checkpoint", "names/Irish.txt"], "--checkpoint", "--data"),
        (["--data", "~/names.zip", "--checkpoint", "names.zip"], "--checkpoint", "--data"),
        (["--checkpoint", "names/Irish.txt"], "--checkpoint", "NAMERNN_FAST_DATA"),
        (["--teacher", "model", "--checkpoint", "./model"], "--checkpoint", "--teacher"),
        (["--checkpoint", pretrained_checkpoint()], "--checkpoint", "predict without options"),
    ],
)
def test_training_does_not_overwrite_its_inputs(
    fails, folder, tmp_path, monkeypatch, options, written, read
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAMERNN_FAST_DATA", "names")
    for name in ("names.zip", "model"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(train.options, "load_data", None)  # the data must not be read
    before = contents(tmp_path)
    message = fails("train", "--force", *options)
    assert re.match(rf"{written}.* would overwrite what {read} reads, ", message)
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_training_leaves_no_file(run, folder, cache, monkeypatch):
    def interrupt(epoch):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_reporter", lambda recipe: interrupt)
    assert run("train", "--data", folder, *ONCE, code=130)[1] == f"{PROGRAM}: interrupted\n"
    assert not cache.exists() or not contents(cache)


def test_a_full_disk_is_reported_and_leaves_no_file(run, folder, cache, monkeypatch):
    replacing = tensor_files.replacing

    @contextmanager
    def half(path):
        with replacing(path) as file:
            yield file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_files, "replacing", half)
    err = run("train", "--data", folder, *ONCE, code=1)[1]
    assert err == f"{PROGRAM}: error: [Errno 28] No space left on device\n"
    assert not contents(cache)


def test_a_teacher_must_match_the_split(run, fails, folder, tmp_path):
    command = ("train", "--data", folder, *SMALL, "--checkpoint")
    small, *teachers = (tmp_path / name for name in ("small", "teacher 0", "teacher 1"))
    reading = ("--ngrams", "--pooling", "last+mean+max")
    for seed, path in enumerate(teachers):
        run(*command, path, "--epochs", 1, "--seed", seed, *reading)
    assert load_checkpoint(teachers[0]).model.config["ngrams"]
    lesson = (*command, small, "--recipe", "distilled", "--epochs", 2, "--made-up", 20, "--teacher")
    run(*lesson, teachers[0])
    record = load_checkpoint(small).info["split"]
    assert record["made_up"] == 20
    assert record["teacher"] == hashlib.sha256(teachers[0].read_bytes()).hexdigest()
    for wrong, reason in (
        ((*lesson, teachers[0], "--split-seed", 1), "the teacher was trained on another split"),
        ((*lesson, "pretrained"), "the teacher was trained on another split"),
        ((*command, small, "--recipe", "distilled"), "--recipe distilled needs --teacher"),
        ((*command, small, "--made-up", 9), "--made-up needs --teacher"),
    ):
        message = fails(*wrong)
        assert reason in message


def test_processes_with_different_data_do_not_train_together(fails, folder, monkeypatch):
    def gather(found, ours):
        found[:] = [ours, "another"]

    monkeypatch.setattr(train, "process", lambda: (0, 2))
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    said = "the processes that train together have read different data"
    assert fails("train", "--data", folder) == said


@pytest.mark.parametrize("size", ["2", "two"])
def test_an_incomplete_torchrun_environment_is_an_error(fails, folder, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    message = fails("train", "--data", folder)
    assert message.startswith("the environment variables are not from torchrun (")


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)
@pytest.mark.slow
def test_two_processes_have_the_same_losses_as_one(folder, run, run_program, root, tmp_path):
    count = len(split(read_names(folder)).train)
    # The last batch has a single name, so the second process gets no name.
    batch_size = next(size for size in range(40, count) if count % size == 1)
    options = ["train", "--data", str(folder), "--epochs", "2", "--batch-size", str(batch_size)]
    options += ["--embedding-size", "5", "--hidden-size", "7", "--lr", "0.01", "--clip", "1"]
    # Processes draw different dropout masks, so character dropout is off.
    options += ["--schedule", "one-cycle", "--members", "2", "--character-dropout", "0"]
    options += ["--checkpoint"]
    run(*options, tmp_path / "one")

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "namernn_fast.names", *options, tmp_path / "two"]
    out = run_program(*torchrun, *program, cwd=root)
    # Only one process reports and saves.
    assert len(out.splitlines()) == 1 + 4 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names", "one", "two"]

    one, two = (load_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.info["split"] == two.info["split"]
    for ours, theirs in zip(two.info["history"], one.info["history"], strict=True):
        for name in ("train_loss", "validation_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=1 / count)
    expected = one.model.state_dict()
    torch.testing.assert_close(two.model.state_dict(), expected, rtol=1e-3, atol=1e-4)
