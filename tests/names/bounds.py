"""Helpers for tests of untrusted files. They limit memory and time, and change values."""

import signal
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from namernn_fast.names import InputError

LEFT_OUT = mock.sentinel.left_out
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _memory(field):
    """Return a field of /proc/self/status in MiB; without Linux, return 0 to disable the limit."""
    if not _CLEAR.exists():
        return 0
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def _hang(*_):
    raise TimeoutError("the block hangs")


@contextmanager
def bounded(mebibytes=64):
    """Check that a block needs less than `mebibytes` MiB of memory and does not hang."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # resets the peak memory to the current memory
    before = _memory("VmRSS")
    handler = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, 300)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert _memory("VmHWM") - before < mebibytes


def refusal(load, path, *arguments):
    """Return why `load` rejects the file at `path`; fail if it takes much memory or hangs."""
    with bounded(), pytest.raises(InputError) as error:
        load(path, *arguments)
    start, _, reason = str(error.value).partition(": ")
    assert start == str(path)
    return reason


def changed(table, changes):
    """Return a copy of `table` with `changes` applied; the value LEFT_OUT removes a key."""
    return {key: value for key, value in {**table, **changes}.items() if value is not LEFT_OUT}
