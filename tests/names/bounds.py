"""Helpers for tests of untrusted files: limits on memory and time, changed content, errors."""

import signal
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from namernn_fast.names import InputError

LEFT_OUT = mock.sentinel.left_out
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _memory(field):
    """Return a field of /proc/self/status in MiB, or 0 without Linux, which disables the limit."""
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
    """Return the reason why `load` rejects the file at `path`, and limit memory and time."""
    with bounded(), pytest.raises(InputError) as error:
        load(path, *arguments)
    start, _, reason = str(error.value).partition(": ")
    assert start == str(path)
    return reason


def changed(table, changes):
    """Return a copy of `table` with other values, and without the keys whose value is LEFT_OUT."""
    return {key: value for key, value in {**table, **changes}.items() if value is not LEFT_OUT}
