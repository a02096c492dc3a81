"""What this machine can do at most, measured: the roofs of roofline.py, and a barrier's price."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("probe.cpp")
SECONDS = 0.2
MOMENT = 0.0002


@dataclass(frozen=True)
class Machine:
    """Rates per second, in a process that has the machine to itself or nearly so."""

    threads: int
    flops: float
    """Of float multiply-adds, two operations each, on all threads together."""
    near_bytes: float
    """Read from a block that half fills a core's second-level cache, by one core."""
    far_bytes: float
    """Read from a block of four times the size of that cache, by one core."""
    near_size: int
    """Bytes of that cache."""
    hop: float
    hop_median: float
    """Seconds for a word from core to core; a step's barrier takes two. 0 on one thread."""


def cpu_name() -> str:
    from cpuinfo import get_cpu_info  # it comes with pytest-benchmark

    return str(get_cpu_info().get("brand_raw", "unknown CPU"))


@cache
def _probe() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    library = Path(tempfile.mkdtemp()) / "probe.so"
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=fast", native]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
    probe = ctypes.CDLL(str(library))
    probe.multiply_add_rate.restype = probe.read_rate.restype = ctypes.c_double
    probe.multiply_add_rate.argtypes = [ctypes.c_double]
    probe.read_rate.argtypes = [ctypes.c_int64, ctypes.c_double]
    return probe


def _near_size() -> int:
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (OSError, ValueError):
        return 2**20


def hop() -> tuple[float, float]:
    """Seconds for a word from core to core: the least, and the median."""
    least, median = ctypes.c_double(), ctypes.c_double()
    _probe().hop_seconds(ctypes.byref(least), ctypes.byref(median))
    return least.value, median.value


def multiply_add_rate(threads: int, seconds: float) -> float:
    """Floating-point operations a second on so many threads together, over so many seconds."""
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        return sum(pool.map(_probe().multiply_add_rate, [seconds] * threads))


def momentary_rate() -> float:
    """The same on the calling thread, before its clock can change."""
    return _probe().multiply_add_rate(MOMENT)


def measure(threads: int) -> Machine:
    """Measure it; about a second and a half."""
    probe = _probe()
    near = _near_size()
    return Machine(
        threads,
        multiply_add_rate(threads, 2 * SECONDS),
        probe.read_rate(near // 2, SECONDS),
        probe.read_rate(4 * near, SECONDS),
        near,
        *(hop() if threads > 1 else (0.0, 0.0)),
    )
