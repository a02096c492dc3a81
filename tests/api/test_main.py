"""Tests the output, the advice and the exit codes of `python -m namernn_fast`."""

import dataclasses
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

import namernn_fast
from namernn_fast import __main__ as cli
from namernn_fast import ops
from namernn_fast.machine import advice, availability

QUIET = advice.Facts(
    has_extension=True,
    threads=2,
    usable=2,
    processors=2,
    load=0.3,
    is_passive=False,
    has_openmp=True,
    gpu_trouble=None,
)


def test_versions_and_paths_are_printed():
    ran = subprocess.run(
        [sys.executable, "-m", "namernn_fast"], capture_output=True, text=True, check=True
    )
    kernels = [ops.cpu_kernel(t) for t in (torch.float32, torch.bfloat16, torch.int8)]
    words = (namernn_fast.__version__, torch.__version__, *kernels, "GRU and LSTM: torch's")
    for word in (*words, "0 MiB, at most 256 MiB"):
        assert word in ran.stdout
    assert not ran.stderr


def test_advice_is_printed(threads, capsys):
    usable = advice.usable_processors()
    threads(usable + 1)
    assert cli.main([]) == 0
    assert f"- Set OMP_NUM_THREADS={usable}, or call" in capsys.readouterr().out


def test_output_says_that_there_is_no_advice(monkeypatch, capsys):
    monkeypatch.setattr(advice, "gather", lambda: QUIET)
    assert cli.main([]) == 0
    assert capsys.readouterr().out.endswith("nothing known would make it faster here.\n")


@pytest.mark.parametrize(
    ("facts", "begins"),
    [
        ({}, []),
        ({"has_extension": False}, ["To get the fused kernel, reinstall it with"]),
        ({"threads": 3}, ["Set OMP_NUM_THREADS=2, or call torch.set_num_threads(2): torch has 3"]),
        ({"load": 4.5}, ["Use fewer threads while other programs run, for example OMP_NUM"]),
        ({"load": 4.5, "is_passive": True, "has_openmp": False}, ["Use fewer threads"]),
        ({"load": 3.5}, []),  # at this load, one thread is not always faster
        ({"load": 4.5, "threads": 1}, []),  # a single thread never waits for another thread
        ({"load": None, "is_passive": True}, []),
        ({"is_passive": True}, ["Unset OMP_WAIT_POLICY=passive if this process has the machine"]),
        ({"is_passive": True, "has_openmp": False}, []),
        ({"is_passive": True, "load": 1.0}, []),
        ({"gpu_trouble": "A GPU is old"}, ["Calls on the GPU run without a kernel. A GPU"]),
        ({"threads": 4, "load": 9.0}, ["Set OMP_NUM_THREADS=2", "Use fewer threads"]),
    ],
    ids=str,
)
def test_each_fact_about_the_machine_leads_to_the_expected_advice(facts, begins):
    found = advice.advise(dataclasses.replace(QUIET, **facts))
    assert [text[: len(begin)] for text, begin in zip(found, begins, strict=True)] == begins


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
    ids=str,
)
def test_usable_processors_respect_a_container_limit(files, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert advice.usable_processors(tmp_path) == (limit or 8)


def test_an_unsupported_gpu_is_reported(monkeypatch):
    why_not = "a cuda device needs Triton 3.6 or newer"
    assert advice.gather().gpu_trouble is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(availability, "why_not_triton", lambda device: why_not)
    assert advice.gather().gpu_trouble == "A cuda device needs Triton 3.6 or newer"
    monkeypatch.setattr(availability, "why_not_triton", lambda device: None)
    assert advice.gather().gpu_trouble is None


def test_help_and_version_exit_successfully(capsys):
    for options, text in (
        (["--version"], f"namernn_fast {namernn_fast.__version__}\n"),
        (["--help"], "bench"),
        (["bench", "--help"], "--seconds S"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(options)
        assert left.value.code == 0
        assert text in capsys.readouterr().out


def test_closed_pipe_does_not_cause_a_traceback(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main([]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RuntimeError("out of\nmemory"), 1, "error: out of memory"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_print_a_single_line(error, code, text, monkeypatch, capsys):
    monkeypatch.setattr(advice, "gather", Mock(side_effect=error))
    assert cli.main([]) == code
    assert capsys.readouterr().err == f"python -m namernn_fast: {text}\n"
