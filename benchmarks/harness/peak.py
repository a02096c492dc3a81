"""Measures how much memory a call adds to this process's peak.

The peak is the largest resident set so far (`VmHWM` in `/proc/self/status`). Without that file,
the fallback is `ru_maxrss`, which is less reliable because a process inherits it from its parent.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
KIBI = 1024


def _status(name: str) -> int:
    """Returns a size in `/proc/self/status`, in bytes."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return KIBI * int(fields[name].split()[0])


def peak_bytes() -> int:
    """Returns the peak size of this process's resident set so far, in bytes."""
    if STATUS.exists():
        return _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else KIBI * largest


def resident_bytes() -> int:
    """Returns the size of this process's resident set, in bytes. Needs Linux."""
    return _status("VmRSS")


def peak_above(call: Callable[[], object]) -> int:
    """Returns how many bytes a call adds to this process's peak memory use."""
    if CLEAR.exists():
        CLEAR.write_text(RESET_PEAK)  # resets the peak to the current size
    before = peak_bytes()
    call()
    return peak_bytes() - before
